"""What a released version has left on disk goes on being read: recipes, runs, checkpoints and weights.

``artefacts/VERSION/METHOD`` holds a recipe, a run that was interrupted after two of its three epochs, and what that version made of
it. They are never written anew.
"""

import json
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from dfkd_fast import load_recipe
from dfkd_fast.cli import app
from dfkd_fast.report import read_run

ARTEFACTS = Path(__file__).parent / "artefacts"
pytestmark = pytest.mark.filterwarnings("ignore::dfkd_fast.renamed.RenamedKeyWarning")

RUNS = sorted(path.parent for path in ARTEFACTS.glob("*/*/finished"))


def run_command(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def values_by_path(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from values_by_path(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def epochs(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def summary(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "summary.json").read_text()))


@pytest.fixture(params=RUNS, ids=lambda path: f"{path.parent.name}-{path.name}")
def old(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def test_there_are_artefacts() -> None:
    assert {path.name for path in RUNS} >= {"mad", "vae"}


def test_a_recipe_file_is_the_recipe_of_its_run(old: Path) -> None:
    written = load_recipe(str(old / f"tiny-{old.name}.toml"), {"engine.precision": "fp32"})
    finished = load_recipe(str(old / "finished" / "recipe.toml"))
    # It extends a shipped recipe, whose provenance may be worded anew.
    assert replace(written, provenance=finished.provenance) == finished


def test_every_key_can_still_be_set_by_its_path(old: Path) -> None:
    stored = old / "finished" / "recipe.toml"
    recipe = load_recipe(str(stored))
    for path, value in values_by_path(tomllib.loads(stored.read_text())):
        assert load_recipe(str(stored), {path: value}) == recipe, path


def test_an_interrupted_run_ends_with_the_same_student(old: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(old / "interrupted", folder)
    run_command("distill", old / f"tiny-{old.name}.toml", "--out", folder, "--resume", "--device", "cpu")
    ended, expected = load_file(folder / "student.safetensors"), load_file(old / "finished" / "student.safetensors")
    assert ended.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ended[name], tensor, rtol=1e-3, atol=1e-5)  # processors round in different orders
    assert all(ours.keys() >= theirs.keys() for ours, theirs in zip(epochs(folder), epochs(old / "finished"), strict=True))
    renamed = {"remarks": "notes"}
    assert summary(folder).keys() >= {renamed.get(key, key) for key in summary(old / "finished")}


def test_a_teachers_training_resumes(tmp_path: Path) -> None:
    old = ARTEFACTS / "0.1.0" / "mad"
    folder = tmp_path / "run"
    shutil.copytree(old / "teacher", folder)
    run_command("teach", old / "tiny-mad.toml", "--out", folder, "--resume", "--device", "cpu")
    ended, expected = load_file(folder / "teacher.safetensors"), load_file(old / "interrupted" / "teacher.safetensors")
    assert all(torch.equal(ended[name], tensor) for name, tensor in expected.items())  # its one epoch was done


def test_weights_are_evaluated_by_their_metadata(old: Path, tmp_path: Path) -> None:
    run_command("evaluate", old / "finished" / "student.safetensors", "--device", "cpu", "--json", tmp_path / "metrics.json")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["role"] == "student"
    assert metrics["top1"] == pytest.approx(summary(old / "finished")["student_accuracy"]["last"], abs=0.5)


def test_finished_runs_are_compared(old: Path) -> None:
    run = read_run(old / "finished")
    assert len(run.curve) == 3
