"""``dfkd-fast distill --budget``: the number of epochs is computed once, and is the run's from then on."""

import json
import os
import signal
import tomllib
from pathlib import Path
from typing import Any

import pytest

from dfkd_fast import DfkdError, Trainer, load_recipe
from dfkd_fast.engine import budget
from dfkd_fast.engine.budget import Durations
from dfkd_fast.recipe import recipe_from_toml, recipe_to_toml
from dfkd_fast.report import Progress
from tests.command_line import CommandResult, Run

TINY = [
    *("--set", "loop.iterations_per_epoch=2", "--set", "loop.batch_size=8", "--set", "loop.student_steps=2"),
    *("--set", "teacher.epochs=2", "--set", "generator.width=2", "--set", "report.samples=9", "--set", "report.samples_every=2"),
]
MEASURED = "90s: 10 s/iteration measured, 3 epochs of 2 iterations"


@pytest.fixture(autouse=True)
def _ten_seconds_per_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps, evaluations and reports are run, but their durations are invented: an epoch takes 20 + 5 + 1 s."""
    measure = budget._measure

    def invented(*arguments: Any) -> Durations:
        measure(*arguments)
        return Durations(iteration=10.0, evaluation=5.0, epoch_end=1.0)

    monkeypatch.setattr(budget, "_measure", invented)
    monkeypatch.setattr(budget, "MAX_REPEATS", 1)


@pytest.fixture
def budgeted(run: Run) -> CommandResult:
    """A finished run of 90 seconds in the folder ``run``."""
    result = run("distill", "digits", "--out", "run", "--budget", "90s", *TINY)
    assert result.code == 0, result.err
    return result


def student(folder: str) -> bytes:
    return Path(folder, "student.safetensors").read_bytes()


def test_the_recipe_of_the_run_has_the_epochs_and_a_record_of_the_budget(budgeted: CommandResult) -> None:
    recipe = load_recipe("run/recipe.toml")
    assert (recipe.loop.epochs, recipe.loop.budget) == (3, "")
    assert recipe.provenance["loop.budget"] == MEASURED
    assert f"budget {MEASURED}\n" in budgeted.out
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["budget"]["computed"] == MEASURED
    phases = sum(summary["seconds"][name] for name in ("student", "generator", "evaluation"))
    assert phases < summary["budget"]["training_seconds"] < summary["seconds"]["total"]
    assert f"{MEASURED}; the training took {summary['budget']['training_seconds']:.1f} s" in budgeted.out


def test_a_run_is_repeated_by_its_recipe_and_by_the_number_of_epochs(run: Run, budgeted: CommandResult) -> None:
    assert run("distill", "run/recipe.toml", "--out", "again").code == 0
    assert student("again") == student("run")
    assert run("distill", "digits", "--out", "epochs", *TINY, "--set", "loop.epochs=3").code == 0
    ours, theirs = (tomllib.loads(Path(folder, "recipe.toml").read_text()) for folder in ("epochs", "run"))
    assert "loop.budget" not in ours["provenance"]
    texts = {"description", "provenance"}
    assert {key: value for key, value in ours.items() if key not in texts} == {key: theirs[key] for key in theirs.keys() - texts}
    assert weights("epochs") == weights("run")
    assert "budget" not in json.loads(Path("epochs/summary.json").read_text())


def weights(folder: str) -> bytes:
    """The student without the header, which holds the recipe."""
    content = student(folder)
    return content[8 + int.from_bytes(content[:8], "little") :]


def test_a_resumed_run_gives_the_same_student(run: Run, budgeted: CommandResult, monkeypatch: pytest.MonkeyPatch) -> None:
    iterate = Trainer.iterate

    def interrupted(trainer: Trainer) -> None:
        iterate(trainer)
        if trainer.iterations_done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "iterate", interrupted)
        assert run("distill", "digits", "--out", "b", "--budget", "90s", *TINY).code == 130
    monkeypatch.setattr(budget, "_measure", None)  # nothing is measured again
    assert run("distill", "digits", "--out", "b", "--resume", "--set", "loop.epochs=3").code == 0
    assert student("b") == student("run")
    assert json.loads(Path("b/summary.json").read_text())["budget"]["computed"] == MEASURED


def test_a_resumed_run_takes_no_budget(run: Run, budgeted: CommandResult) -> None:
    result = run("distill", "digits", "--out", "run", "--resume", "--budget", "2h")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "--resume: loop.budget (--budget) = '2h': run/recipe.toml has loop.epochs = 3, which cannot change" in result.err


def test_a_run_whose_teacher_was_interrupted_under_a_budget_is_distilled(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "epoch", lambda progress, epoch: signal.raise_signal(signal.SIGINT))
        assert run("teach", "digits", "--out", "run", "--set", "loop.budget=90s", *TINY).code == 130
    assert load_recipe("run/recipe.toml").loop.budget == "90s"
    result = run("distill", "digits", "--out", "run", "--resume")
    assert result.code == 0, result.err
    assert load_recipe("run/recipe.toml").loop.epochs == 3


def test_a_budget_shorter_than_an_epoch_leaves_no_folder(run: Run) -> None:
    result = run("distill", "digits", "--out", "run", "--budget", "20s", *TINY)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "loop.budget (--budget) = '20s': one epoch of 2 iterations takes 26 s; increase the budget" in result.err
    assert not Path("run").exists()


def test_without_data_a_budget_is_filled_too(run: Run, budgeted: CommandResult) -> None:
    blind = [*TINY, "--set", "data.name=none", "--teacher", "run/teacher.safetensors"]
    result = run("distill", "digits", "--out", "blind", "--budget", "90s", *blind)
    assert result.code == 0, result.err
    assert load_recipe("blind/recipe.toml").loop.epochs == 3


def test_a_number_of_epochs_replaces_the_budget_of_the_recipe_it_changes(tmp_path: Path) -> None:
    base, child = tmp_path / "base.toml", tmp_path / "child.toml"
    base.write_text('extends = "digits"\n[loop]\nbudget = "40min"\n')
    child.write_text('extends = "base.toml"\n[loop]\nepochs = 7\n')
    assert load_recipe(str(base)).loop.budget == "40min"
    for recipe in (load_recipe(str(base), {"loop.epochs": 7}), load_recipe(str(child))):
        assert (recipe.loop.epochs, recipe.loop.budget) == (7, "")
    child.write_text('extends = "base.toml"\n[loop]\nbatch_size = 7\n')
    assert load_recipe(str(child)).loop.budget == "40min"
    assert load_recipe(str(child), {"loop.budget": "2h"}).loop.budget == "2h"


def test_a_recipe_with_a_budget_is_the_same_after_it_was_printed() -> None:
    recipe = load_recipe("digits", {"loop.budget": "2h30min"})
    assert recipe_from_toml(recipe_to_toml(recipe), "here") == recipe


def test_the_record_goes_with_the_number_that_it_speaks_of(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'extends = "digits"\n[loop]\nepochs = 3\n[provenance]\n"loop.budget" = "{MEASURED}"\n')
    assert load_recipe(str(path), {"loop.epochs": 3}).provenance["loop.budget"] == MEASURED
    assert "loop.budget" not in load_recipe(str(path), {"loop.epochs": 4}).provenance


def test_both_at_once_are_refused() -> None:
    with pytest.raises(DfkdError, match=r"loop\.budget = '40min': loop.epochs follows from it, and both are given"):
        load_recipe("digits", {"loop.epochs": 3, "loop.budget": "40min"})
