"""Warnings for teachers and students that are no better than chance."""

import json
from pathlib import Path

import pytest

from dfkd_fast.evaluation import Evaluator
from tests.command_line import Run

TINY = [
    *("--set", "loop.epochs=8", "--set", "loop.iterations_per_epoch=1", "--set", "loop.batch_size=8", "--set", "loop.student_steps=1"),
    *("--set", "teacher.epochs=1", "--set", "generator.width=2", "--set", "report.samples=9", "--set", "report.samples_every=100"),
]
OF_STUDENT = "epochs the student's top-1 accuracy is 9.80 %, which is chance (10.00 %); check the teacher's top-1 accuracy (97.00 %)"


def evaluate_as(patch: pytest.MonkeyPatch, *accuracies: float) -> None:
    """Replace evaluations by the teacher's accuracy, then the student's by epoch; the last value repeats."""
    remaining = list(accuracies)
    patch.setattr(Evaluator, "__call__", lambda *_: remaining.pop(0) if len(remaining) > 1 else remaining[0])


def notes() -> list[str]:
    return list(json.loads(Path("a/summary.json").read_text())["notes"])


def test_a_student_at_chance_after_a_quarter_of_the_epochs_is_reported_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate_as(monkeypatch, 97.0, 9.8)
    result = run("distill", "digits", "--out", "a", *TINY)
    assert result.code == 0
    assert result.err == ""
    lines = [line for line in result.out.splitlines() if line.startswith(f"after 2 of 8 {OF_STUDENT}")]
    assert len(lines) == 1
    assert "data.mean" in lines[0]
    assert "student_optimizer.lr = 0.002" in lines[0]
    assert notes() == lines


def test_it_is_reported_at_the_first_evaluation_after_the_quarter(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate_as(monkeypatch, 97.0, 9.8)
    run("distill", "digits", "--out", "a", *TINY, "--set", "loop.evaluate_every=3")
    assert [note.partition(" epochs")[0] for note in notes()] == ["after 3 of 8"]


def test_a_student_that_is_better_than_chance_is_not_warned_about(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate_as(monkeypatch, 97.0, 9.8, 60.0, 9.8)
    result = run("distill", "digits", "--out", "a", *TINY)
    assert "chance" not in result.out
    assert notes() == []


def test_a_teacher_at_chance_is_reported_before_the_distillation_and_its_student_is_not_warned_about(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate_as(monkeypatch, 10.0)
    result = run("distill", "digits", "--out", "a", *TINY)
    warning = "the teacher's top-1 accuracy is 10.00 %, which is chance (10.00 %), and a student cannot be better"
    lines = result.out.splitlines()
    position = next(number for number, line in enumerate(lines) if line.startswith(warning))
    assert position < next(number for number, line in enumerate(lines) if "student 1/8" in line)
    assert len(notes()) == 1
    assert notes()[0].startswith(warning)
