import time
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import accuracy
from bench.gpu.accuracy import PLAN, REHEARSAL, Plan
from bench.gpu.context import Context
from bench.gpu.records import Record, cases_done
from bench.gpu.summary import latest
from dfkd_fast.commands import distill
from dfkd_fast.run import Run

SEED_0 = [f"{settings.name} seed 0" for settings in REHEARSAL.recipes]


def context_of(records: list[Record], *, rehearse: bool = True, data_root: Path | None = None, **changes: Any) -> Context:
    options: dict[str, Any] = {"origin": {"commit": "abc"}, "deadline": time.monotonic() + 1000} | changes
    return Context("accuracy", "cpu", rehearse, send=records.append, data_root=data_root, **options)


def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit the rehearsal to two recipes."""
    monkeypatch.setattr(accuracy, "REHEARSAL", Plan(REHEARSAL.recipes[:2], seeds=1))


def test_a_run_is_recorded_as_its_summary_with_the_command_that_reproduces_it() -> None:
    records: list[Record] = []
    accuracy.run(context_of(records))
    now = latest(records)
    assert [(record.case, record.status) for record in now] == [(case, "ok") for case in SEED_0]
    for record, settings in zip(now, REHEARSAL.recipes, strict=True):
        row = record.row
        assert (record.table, record.highlight) == ("accuracy", True)
        assert row["commit"] == "abc"
        assert row["command"].startswith(f"dfkd-fast distill {settings.name} --seed 0 --set teacher.epochs=1 ")
        assert "report" not in row["command"]
        assert row["recipe"].startswith(f"{settings.name} (2 of "), "a shortened run is marked as such"
        assert row["retention"]["last"] == row["student_accuracy"]["last"]
        assert 0 < row["teacher_accuracy"] <= 100
        assert row["seconds"]["total"] > row["seconds"]["teacher"] > 0
    assert {record.row["teacher_trained_in"] for record in now} == {SEED_0[0]}
    assert len({record.row["teacher_accuracy"] for record in now}) == 1


def test_a_teacher_is_shared_within_its_seed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "REHEARSAL", Plan(REHEARSAL.recipes[:2], seeds=2))
    records: list[Record] = []
    accuracy.run(context_of(records))
    assert [(record.case, record.row["teacher_trained_in"]) for record in latest(records)] == [
        ("digits-dfad seed 0", "digits-dfad seed 0"),
        ("digits-mad seed 0", "digits-dfad seed 0"),
        ("digits-dfad seed 1", "digits-dfad seed 1"),
        ("digits-mad seed 1", "digits-dfad seed 1"),
    ]


def test_a_run_that_the_deadline_stops_is_left_with_its_last_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    two(monkeypatch)
    monkeypatch.setattr(accuracy, "MARGIN", 1e6)
    records: list[Record] = []
    context = context_of(records)
    accuracy.run(context)
    assert context.left == SEED_0[:2]
    for record in latest(records):
        assert (record.status, record.table) == ("left", "accuracy-so-far")
        assert record.row["epoch"] == 1
        assert f"epoch 1 of 2, {record.row['student_accuracy']:.2f} %" in record.text


def test_a_run_that_fails_does_not_affect_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    two(monkeypatch)
    distilled = distill.distill

    def first_fails(run: Run) -> dict[str, Any]:
        if run.recipe.name == "digits-dfad":
            raise RuntimeError("no kernel image")
        return distilled(run)

    monkeypatch.setattr(distill, "distill", first_fails)
    records: list[Record] = []
    accuracy.run(context_of(records))
    assert [(record.case, record.status) for record in latest(records)] == [(SEED_0[0], "failed"), (SEED_0[1], "ok")]
    assert records[0].text == "RuntimeError: no kernel image"
    assert records[-1].row["teacher_trained_in"] == SEED_0[1]


def test_a_later_call_runs_only_the_cases_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    two(monkeypatch)
    records: list[Record] = []
    accuracy.run(context_of(records, done={SEED_0[0]}))
    assert cases_done(records, "accuracy") == {SEED_0[1]}
    assert {record.case for record in records} == {SEED_0[1]}


def test_without_time_every_run_is_left() -> None:
    records: list[Record] = []
    context = context_of(records, deadline=time.monotonic())
    accuracy.run(context)
    assert [(record.case, record.status) for record in records] == [(case, "left") for case in SEED_0]
    assert context.left == SEED_0


def test_without_mnist_every_run_is_left_with_the_reason(tmp_path: Path) -> None:
    for root, reason in ((None, "no MNIST: --data-root was not given"), (tmp_path, f"no MNIST: {tmp_path} has no folder MNIST/raw")):
        records: list[Record] = []
        accuracy.run(context_of(records, rehearse=False, data_root=root))
        assert len(records) == PLAN.seeds * len(PLAN.recipes)
        assert {(record.status, record.text) for record in records} == {("left", reason)}


def test_the_plan_runs_whole_recipes_or_titles_the_shortened_ones(tmp_path: Path) -> None:
    cases = [accuracy._case(settings, 1, tmp_path) for settings in PLAN.recipes]
    assert [case.title for case in cases] == ["mnist-dfad", "mnist-mad", "mnist-pre (10 of 40 epochs)", "mnist-retain (10 of 40 epochs)"]
    assert [case.command for case in cases][::3] == [
        "dfkd-fast distill mnist-dfad --seed 1 --data-root DIR",
        "dfkd-fast distill mnist-retain --seed 1 --set loop.epochs=10 --data-root DIR",
    ]
    assert {case.recipe.data.root for case in cases} == {str(tmp_path)}
    assert len({case.teacher for case in cases}) == 1
