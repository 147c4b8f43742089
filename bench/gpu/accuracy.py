"""Stage 6: whole runs of the MNIST recipes, from training the teacher to the student's test accuracy, with several seeds."""

import gc
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from rich.console import Console
from typing_extensions import override

from dfkd_fast import Recipe, load_recipe
from dfkd_fast.commands import distill
from dfkd_fast.engine import Epoch
from dfkd_fast.engine.method import resolved
from dfkd_fast.log import log_to_console
from dfkd_fast.report import RunFolder
from dfkd_fast.run import Run

from .context import Context

__all__ = ["Case", "Plan", "run"]

MARGIN = 3.0  # seconds that a run needs after its last epoch
UNWRITTEN = {"report.checkpoint_every": 1_000_000, "report.samples_every": 1_000_000}
"""Disables checkpoints and samples, which do not affect the student."""


class RunSettings(NamedTuple):
    """A recipe, with overrides that fit it into the stage's time limit."""

    name: str
    changes: Mapping[str, object]
    needs: float
    """Minimum remaining time in seconds to start a run."""


@dataclass(frozen=True)
class Plan:
    """The runs: all recipes with seed 0, then all with seed 1, and so on."""

    recipes: tuple[RunSettings, ...]
    seeds: int


PLAN = Plan(
    recipes=(
        RunSettings("mnist-dfad", {}, needs=25),
        RunSettings("mnist-mad", {}, needs=20),
        RunSettings("mnist-pre", {"loop.epochs": 10}, needs=20),
        RunSettings("mnist-retain", {"loop.epochs": 10}, needs=20),
    ),
    seeds=3,
)
_TOY = {"teacher.epochs": 1, "loop.epochs": 2, "loop.iterations_per_epoch": 2, "loop.student_steps": 2, "generator.width": 4}
REHEARSAL = Plan(
    recipes=(
        RunSettings("digits-dfad", {**_TOY, "loop.batch_size": 32}, needs=1),
        RunSettings("digits-mad", {**_TOY, "loop.batch_size": 16}, needs=1),
        RunSettings("digits-vae", {**_TOY, "loop.batch_size": 24, "replay.rows": 8}, needs=1),
        RunSettings("digits-retain", {**_TOY, "loop.batch_size": 24, "replay.rows": 8}, needs=1),
    ),
    seeds=1,
)


@dataclass(frozen=True)
class Case:
    """One run."""

    recipe: Recipe
    changes: Mapping[str, object]
    """Overrides of the shipped recipe."""
    epochs: int
    """Epochs of the shipped recipe."""

    @property
    def title(self) -> str:
        """The recipe's name, with the number of epochs if reduced."""
        epochs = self.recipe.loop.epochs
        return self.recipe.name if epochs == self.epochs else f"{self.recipe.name} ({epochs} of {self.epochs} epochs)"

    @property
    def name(self) -> str:
        """Name of the case in its records."""
        return f"{self.recipe.name} seed {self.recipe.seed}"

    @property
    def command(self) -> str:
        """Equivalent command line."""
        changes = "".join(f" --set {path}={value}" for path, value in self.changes.items())
        root = " --data-root DIR" if self.recipe.data.root else ""
        return f"dfkd-fast distill {self.recipe.name} --seed {self.recipe.seed}{changes}{root}"

    @property
    def teacher(self) -> str:
        """Identifies the trained teacher: everything that it depends on."""
        return repr((self.recipe.data, self.recipe.teacher, self.recipe.teacher_optimizer, self.recipe.seed))


class _OutOfTime(Exception):  # noqa: N818  # not an error
    """The next epoch would not end before the deadline."""


class _WatchedFolder(RunFolder):
    """A run folder that calls a function with every logged epoch. It is deleted after the stage, so nothing is plotted."""

    def __init__(self, path: Path, watch: Callable[[Epoch], None]) -> None:
        super().__init__(path)
        self._watch = watch

    @override
    def log(self, epoch: Epoch) -> None:
        super().log(epoch)
        self._watch(epoch)

    @override
    def plot_curves(self, epochs: Sequence[Epoch], teacher_accuracy: float | None, title: str, metric: str) -> None:
        pass

    @override
    def plot_teacher_curves(self, epochs: Sequence[Epoch], title: str, metric: str) -> None:
        pass

    @override
    def plot_samples_over_time(self, image_size: int, segmentation: bool, count: int) -> None:
        pass


def run(context: Context) -> None:
    """Record a row for each run: the summary that ``dfkd-fast distill`` writes, with command and commit.

    Recipes with equal teachers share one per seed. A run that the deadline stops is recorded as left, with its last epoch's accuracy.
    """
    plan = REHEARSAL if context.rehearse else PLAN
    if (reason := _missing_data(plan, context.data_root)) is not None:
        for seed in range(plan.seeds):
            for settings in plan.recipes:
                context.leave(f"{settings.name} seed {seed}", reason)
        return
    teachers: dict[str, tuple[str, Path]] = {}
    with TemporaryDirectory() as folder:
        for seed in range(plan.seeds):
            for settings in plan.recipes:
                case = _case(settings, seed, context.data_root)
                for _ in context.cases([case.name], needs=settings.needs):
                    with context.attempt(case.name):
                        _run(context, case, Path(folder) / case.name.replace(" ", "-"), teachers)


def _missing_data(plan: Plan, data_root: Path | None) -> str | None:
    """Return why the recipes cannot be run, or None."""
    if all(load_recipe(settings.name).data.name != "mnist" for settings in plan.recipes):
        return None
    if data_root is None:
        return "no MNIST: --data-root was not given"
    return None if (data_root / "MNIST" / "raw").is_dir() else f"no MNIST: {data_root} has no folder MNIST/raw"


def _case(settings: RunSettings, seed: int, data_root: Path | None) -> Case:
    shipped = load_recipe(settings.name)
    root = {"data.root": str(data_root)} if shipped.data.name == "mnist" else {}
    recipe = load_recipe(settings.name, {**settings.changes, **UNWRITTEN, **root, "seed": seed})
    return Case(recipe, settings.changes, shipped.loop.epochs)


def _run(context: Context, case: Case, path: Path, teachers: dict[str, tuple[str, Path]]) -> None:
    """Distill; record the accuracy of every epoch, then the whole run."""

    def watch(epoch: Epoch) -> None:
        if epoch.number == case.recipe.loop.epochs:
            return
        # This record remains if the run does not finish.
        accuracy = f"{epoch.student_accuracy:.2f} %" if epoch.student_accuracy is not None else "not evaluated"
        text = f"{case.title} seed {case.recipe.seed}: epoch {epoch.number} of {case.recipe.loop.epochs}, {accuracy}"
        row = {"recipe": case.title, "seed": case.recipe.seed, "epoch": epoch.number, "student_accuracy": epoch.student_accuracy}
        context.record(case.name, "left", text, highlight=True, table="accuracy-so-far", row=row)
        if context.seconds_left() < epoch.seconds + MARGIN:
            raise _OutOfTime

    gc.collect()
    if context.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(context.device)
    folder = _WatchedFolder(path, watch)
    owner, weights = teachers.get(case.teacher, ("", None))
    if weights is not None:
        path.mkdir()
        shutil.copyfile(weights, folder.teacher)
    console = Console(file=sys.stdout, width=140)
    try:
        with log_to_console(console):
            summary = distill.distill(Run(resolved(case.recipe, context.device), folder, context.device, console, "dfkd-fast distill"))
    except _OutOfTime:
        context.left.append(case.name)
        return
    finally:
        if folder.teacher.is_file():
            teachers.setdefault(case.teacher, (case.name, folder.teacher))
    row = _row(context, case, summary, owner)
    context.record(case.name, text=_line(case, row), seconds=round(row["seconds"]["total"], 2), highlight=True, table="accuracy", row=row)


def _row(context: Context, case: Case, summary: dict[str, Any], owner: str) -> dict[str, Any]:
    """Return the summary with command and commit.

    If another run trained the teacher, its training time is added to ``total``, so that ``total`` is the time of a whole run.
    """
    seconds = dict(summary["seconds"])
    if owner:
        seconds["total"] += seconds["teacher"]
    return {
        "command": case.command,
        "commit": context.origin["commit"],
        **summary,
        "recipe": case.title,
        "seconds": seconds,
        "teacher_trained_in": owner or case.name,
    }


def _line(case: Case, row: dict[str, Any]) -> str:
    student, seconds = row["student_accuracy"], row["seconds"]
    return (
        f"{case.title} seed {case.recipe.seed}: student {student['last']:.2f} % (best {student['best']:.2f}), teacher"
        f" {row['teacher_accuracy']:.2f} %, {seconds['total']:.1f} s, including {seconds['teacher']:.1f} s for the teacher"
        f"{''.join(f'; {note}' for note in row['notes'])}"
    )
