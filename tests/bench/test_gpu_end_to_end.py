import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self

import pytest
import torch

from bench.end_to_end import Row, measuring
from bench.end_to_end.contenders import Contender, build
from bench.gpu import end_to_end
from bench.gpu.context import Context
from bench.gpu.end_to_end import ENGINE, PLAN, REHEARSAL, Case, Priority
from bench.gpu.records import Record, cases_done
from bench.gpu.summary import latest
from bench.processes import OutOfTime, WorkerError
from bench.table import names
from dfkd_fast import load_recipe

CPU = torch.device("cpu")
RECIPE = load_recipe("digits-dfad", {"loop.batch_size": 4, "generator.width": 4, "loop.student_steps": 1})
OTHER = replace(RECIPE, name="other")


def context_of(records: list[Record], *, seconds: float = 1000.0, done: set[str] | None = None) -> Context:
    origin = {"device": "a CPU", "commit": "abc", "command": "python -m bench gpu"}
    return Context("end-to-end", "cpu", True, time.monotonic() + seconds, records.append, done=done or set(), origin=origin)


def case(contender: str, build_it: Callable[[], Contender] | None = None, limit: float = 1000.0) -> Case:
    usual = partial(build, RECIPE, CPU, "fp32", contender, graphs=True)
    return Case(RECIPE, contender, build_it or usual, Priority((), limit, needs=0))


def fails() -> Contender:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nat length")


def hangs() -> Contender:
    time.sleep(1e6)
    raise AssertionError


def dies() -> Contender:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def falls_back() -> Contender:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    note = "steps run eagerly, not as CUDA graphs: the student step: an operation waits"
    return Contender(lambda count: [(1.0, 2.0)] * count, optimizer, "bf16", [note], captured=True, capture_succeeded=lambda: False)


class Inside:
    """Calls functions in this process instead of a worker."""

    def __init__(self, count: int, prepare: object) -> None:
        measuring._contender.clear()

    def __enter__(self) -> "Inside":
        return self

    def __exit__(self, *_: object) -> None:
        measuring._contender.clear()

    def take(self, limit: float) -> "Inside":
        assert limit > 0
        return self

    def call(self, function: Callable[..., Any], *arguments: object, limit: float) -> Any:
        assert limit > 0
        try:
            return function(*arguments)
        except Exception as error:
            raise WorkerError(f"{type(error).__name__}: {error}", "a traceback") from error


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "Workers", Inside)


def run(monkeypatch: pytest.MonkeyPatch, groups: list[list[Case]], context: Context) -> None:
    monkeypatch.setattr(end_to_end, "_cases", lambda plan, device: groups)
    end_to_end.run(context)


def statuses(records: list[Record]) -> dict[str, str]:
    return {record.case: record.status for record in latest(records) if ": kernel " not in record.case}


def test_contenders_that_fail_hang_or_die_are_failures_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[Record] = []
    run(monkeypatch, [[case("hanging", hangs, limit=0.2), case("dying", dies), case("failing", fails), case("plain")]], context_of(records))
    assert statuses(records) == {
        "digits-dfad / hanging": "failed",
        "digits-dfad / dying": "failed",
        "digits-dfad / failing": "failed",
        "digits-dfad / plain": "ok",
        "digits-dfad": "ok",
    }
    texts = [record.text for record in records if record.status == "failed"]
    assert texts == ["out of time: stopped after 0 s", "killed by SIGKILL", "OutOfMemoryError: CUDA out of memory. Tried to allocate"]
    assert "in fails" in next(record.detail for record in records if "failing" in record.case)


@pytest.mark.usefixtures("inside")
def test_a_contender_that_fell_back_to_eager_steps_has_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[Record] = []
    run(monkeypatch, [[case(ENGINE, falls_back), case("plain")]], context_of(records))
    failed = records[0]
    assert (failed.case, failed.status, failed.row) == ("digits-dfad / engine (+ CUDA graphs)", "failed", {})
    assert "an operation waits" in failed.text
    assert records[-1].status == "ok"
    assert "CUDA graphs" not in next(record.text for record in records if record.highlight)


@pytest.mark.usefixtures("inside")
def test_the_rehearsal_records_whole_rows_kernels_and_a_line_a_recipe() -> None:
    records: list[Record] = []
    end_to_end.run(context_of(records))
    now = latest(records)
    assert all(record.status == "ok" for record in now), [record.text for record in now if record.status != "ok"]
    rows = [record.row for record in now if record.table == "end-to-end"]
    assert [row["contender"] for row in rows] == ["plain", ENGINE, "+ fused kernels"]
    for row in rows:
        assert tuple(row) == names(Row)
        assert 0 < row["student_seconds"] < row["seconds_per_iteration"]
        assert row["lower_quartile_seconds"] <= row["seconds_per_iteration"] <= row["upper_quartile_seconds"]
        assert row["turns"] == REHEARSAL.minimum
        assert row["kernels_per_step"] == pytest.approx(row["kernels_per_iteration"] / 3, abs=0.01)
        assert row["kernel_seconds"] > 0
        assert 0 <= row["peak_memory_mib"] < row["reserved_mib"]
        assert (row["device"], row["commit"], row["command"]) == ("a CPU", "abc", "python -m bench gpu")
    assert rows[0]["speedup_over_plain"] == 1.0
    assert rows[1]["speedup_over_plain"] == pytest.approx(rows[0]["seconds_per_iteration"] / rows[1]["seconds_per_iteration"], rel=0.01)
    for row in rows:
        kernels = [record.row for record in now if record.table == "kernels" and record.row["contender"] == row["contender"]]
        assert 0 < len(kernels) <= 25
        assert [kernel["rank"] for kernel in kernels] == list(range(1, len(kernels) + 1))
        assert math.fsum(kernel["share"] for kernel in kernels) <= 1.001
        assert kernels[0]["us_per_iteration"] >= kernels[-1]["us_per_iteration"]
    (line,) = [record for record in now if record.highlight]
    assert line.text.startswith("digits-mad 8: plain ")
    assert "× plain)" in line.text.partition("engine with CUDA graphs ")[2]


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("part", ["memory", "kernels"])
def test_results_are_recorded_before_the_part_that_fails(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no CUPTI")

    monkeypatch.setattr(measuring, part, broken)
    records: list[Record] = []
    run(monkeypatch, [[case("plain")]], context_of(records))
    assert statuses(records) == {"digits-dfad / plain": "ok", "digits-dfad": "ok", f"digits-dfad / plain: {part}": "failed"}
    row = next(record.row for record in latest(records) if record.case == "digits-dfad / plain")
    assert row["seconds_per_iteration"] > 0
    assert (row["reserved_mib"] is None) == (part == "memory")
    assert row["kernels_per_iteration"] is None


@pytest.mark.usefixtures("inside")
def test_without_time_every_case_is_left() -> None:
    records: list[Record] = []
    context = context_of(records, seconds=-1)
    end_to_end.run(context)
    assert [record.status for record in records] == ["left"] * 3
    assert context.left == [record.case for record in records]


@pytest.mark.usefixtures("inside")
def test_a_contender_that_the_deadline_stops_is_left_and_not_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*_: object, **__: object) -> None:
        raise OutOfTime("out of time")

    monkeypatch.setattr(Inside, "call", call)
    for seconds, status in ((end_to_end.MARGIN, "left"), (1000.0, "failed")):
        records: list[Record] = []
        context = context_of(records, seconds=seconds)
        run(monkeypatch, [[case("plain")]], context)
        assert statuses(records) == {"digits-dfad / plain": status}
        assert context.left == (["digits-dfad / plain"] if status == "left" else [])


@pytest.mark.usefixtures("inside")
def test_a_later_call_measures_what_is_left_and_keeps_the_line_of_the_former(monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[Record] = []
    groups = [[case("plain"), case(ENGINE, falls_back)]]
    run(monkeypatch, groups, context_of(records))
    done = cases_done(records, "end-to-end")
    assert "digits-dfad / plain" in done
    assert "digits-dfad / engine (+ CUDA graphs)" not in done
    later: list[Record] = []
    run(monkeypatch, [[case("plain"), case(ENGINE)]], context_of(later, done=done))
    assert {record.row["contender"] for record in later if record.row} == {ENGINE}
    lines = [record.text for record in latest([*records, *later]) if record.highlight]
    assert len(lines) == 2
    assert "plain" in lines[0]
    assert "engine with CUDA graphs" in lines[1]


class Compilers:
    """Fake of a pool of processes."""

    def __init__(self, function: Callable[[end_to_end.Job], float], processes: int) -> None:
        self.function, self.processes = function, processes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def results(self, jobs: Sequence[end_to_end.Job], deadline: float) -> Iterator[tuple[end_to_end.Job, float | WorkerError]]:
        for job in jobs:
            try:
                yield job, self.function(job)
            except torch.OutOfMemoryError as error:
                yield job, WorkerError(str(error))


@pytest.mark.usefixtures("inside")
def test_contenders_are_compiled_before_anything_is_timed_and_a_failure_affects_only_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "Pool", Compilers)
    monkeypatch.setattr(end_to_end, "prepare", lambda rehearse: None)  # it configures a worker process
    monkeypatch.setattr(end_to_end, "COMPILED", ENGINE)  # which needs no compilation
    records: list[Record] = []
    run(monkeypatch, [[case("plain"), case(ENGINE), replace(case(ENGINE, fails), recipe=OTHER)]], context_of(records))
    first = records[0]
    assert (first.case, first.status, first.table) == ("compiling", "ok", "compilation")
    assert list(first.row) == ["digits-dfad / engine (+ CUDA graphs)"]
    assert "1 of 2" in first.text
    assert statuses(records) == {
        "compiling": "ok",
        "digits-dfad / plain": "ok",
        "digits-dfad / engine (+ CUDA graphs)": "ok",
        "digits-dfad": "ok",
        "other / engine (+ CUDA graphs)": "failed",
    }


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_plan_puts_the_engine_and_its_peers_of_every_recipe_before_single_features(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(end_to_end, "resolve_precision", lambda setting, device: precision)
    first, eager, features, compiled = end_to_end._cases(PLAN, torch.device("cuda"))
    recipes = ["mnist-dfad", "cifar10-dfad", "cifar10-mad", "imagenet-mad, unconditional"]
    assert [one.name for one in first] == [f"{recipe} / {name}" for recipe in recipes for name in ("plain", ENGINE, "plain compiled")]
    assert [one.name for one in eager] == [f"{recipe} / + {precision} autocast" for recipe in recipes]
    regions = [*(f"engine, compiled {region}" for region in ("teacher", "student", "generator")), "+ torch.compile"]
    assert [one.name for one in compiled] == [f"{recipe} / {name}" for recipe in recipes for name in regions]
    names = [
        "+ no redundant gradients",
        "+ channels-last",
        "+ transposed convolution",
        "+ fused kernels",
        "+ folded teacher",
        "+ fused teacher",
    ]
    assert [one.name for one in features] == [f"{recipe} / {name}" for recipe in recipes for name in names]
    assert [one.recipe.loop.batch_size for one in first[::3]] == [512, 256, 256, 128]
