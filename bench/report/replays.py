"""The table of the replays on CIFAR-10, from the folders of their runs."""

import json

from dfkd_fast.recipe import Recipe, recipe_from_toml

from ..provenance import ROOT
from .markdown import code, marker, table

__all__ = ["FOLDER", "REPLAYS", "replay_table"]

FOLDER = ROOT / "bench" / "results" / "cifar10-replays"
REPLAYS = marker("replays on CIFAR-10", "bench/results/cifar10-replays")


def replay_table() -> str:
    """One row for each run: that without replay first, then by recipe and number of iterations."""
    titles = (
        *("recipe", "iterations", "student samples", "last epoch", "best epoch", "variance, last ¾", "largest drop"),
        *("student steps (s)", "generator steps (s)"),
    )
    runs = [(recipe_from_toml(path.read_text(), str(path)), path.parent) for path in FOLDER.glob("*/recipe.toml")]
    runs.sort(key=lambda run: (run[0].replay.replays, run[0].name, _iterations(run[0])))
    rows = []
    for recipe, folder in runs:
        summary = json.loads((folder / "summary.json").read_text())
        retained, seconds = summary["retention"], summary["seconds"]
        rows.append(
            (
                code(recipe.name),
                f"{_iterations(recipe):,}",
                f"{_student_samples(recipe):,}",
                *(f"{retained[name]:.2f}" for name in ("last", "best", "settled_variance", "largest_drop")),
                *(f"{seconds[name]:.0f}" for name in ("student", "generator")),
            )
        )
    return table(titles, rows)


def _iterations(recipe: Recipe) -> int:
    return recipe.loop.epochs * recipe.loop.iterations_per_epoch


def _student_samples(recipe: Recipe) -> int:
    """Returns the number of rows of all student steps, as if the first ones replayed too."""
    replayed = recipe.replay.num_rows(recipe.loop.batch_size) if recipe.replay.replays else 0
    return _iterations(recipe) * recipe.loop.student_steps * (recipe.loop.batch_size + replayed)
