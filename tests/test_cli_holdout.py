"""``data.holdout`` on the command line: results on held-out training images cannot be taken for test results."""

import json
from pathlib import Path

import pytest

from dfkd_fast.report.compare import read_run
from tests.command_line import Run

TINY = [
    *("--set", "loop.epochs=1", "--set", "loop.iterations_per_epoch=1", "--set", "loop.batch_size=8", "--set", "teacher.epochs=1"),
    *("--set", "generator.width=2", "--set", "report.samples=2"),
]
HELD_OUT = "300 held-out training images"


@pytest.fixture
def chosen(run: Run, tmp_path: Path) -> Path:
    """A run that is evaluated on 300 held-out training images."""
    folder = tmp_path / "chosen"
    result = run("distill", "digits", "--out", folder, *TINY, "--set", "data.holdout=300")
    assert result.code == 0, result.err
    return folder


def test_a_run_names_the_held_out_images_wherever_it_reports_accuracy(chosen: Path, run: Run, tmp_path: Path) -> None:
    assert json.loads((chosen / "summary.json").read_text())["metric"] == f"top-1 accuracy ({HELD_OUT})"
    page = (chosen / "report.html").read_text()
    assert f"On {HELD_OUT}" in page
    assert "the test set" not in page
    assert read_run(chosen).metric == f"top-1 accuracy ({HELD_OUT})"
    assert run("distill", "digits", "--out", tmp_path / "tested", *TINY).code == 0
    compared = run("compare", chosen, tmp_path / "tested", "--out", tmp_path / "plot.png")
    assert compared.code == 0, compared.err
    said = compared.out.replace("\n", "")
    assert f"top-1 accuracy ({HELD_OUT}): {chosen}" in said
    assert f"top-1 accuracy: {tmp_path / 'tested'}" in said


def test_evaluate_says_which_images_a_run_is_evaluated_on(chosen: Path, run: Run, tmp_path: Path) -> None:
    metrics = []
    for name, options in (("held-out", []), ("test", ["--set", "data.holdout=0"])):
        result = run("evaluate", chosen / "student.safetensors", "--json", tmp_path / f"{name}.json", *options)
        assert result.code == 0, result.err
        assert (HELD_OUT in result.out) == (name == "held-out")
        metrics.append(json.loads((tmp_path / f"{name}.json").read_text()))
    assert [(one["count"], one["images"]) for one in metrics] == [(300, HELD_OUT), (450, "test images")]


@pytest.mark.parametrize(("holdout", "noted"), [(0, False), (200, False), (300, False), (301, True)])
def test_a_teacher_that_was_trained_on_held_out_images_is_noted(chosen: Path, run: Run, tmp_path: Path, holdout: int, noted: bool) -> None:
    options = ["--teacher", chosen / "teacher.safetensors", "--set", f"data.holdout={holdout}"]
    result = run("distill", "digits", "--out", tmp_path / "student", *TINY, *options)
    assert result.code == 0, result.err
    assert ("was trained with data.holdout = 300, on images that are held out here" in result.out.replace("\n", " ")) == noted


def test_the_holdout_of_a_run_is_fixed(chosen: Path, run: Run) -> None:
    result = run("distill", "digits", "--out", chosen, "--resume", *TINY, "--set", "data.holdout=200")
    assert result.code == 2
    assert "data.holdout is 300" in result.err
    assert "cannot become 200" in result.err
