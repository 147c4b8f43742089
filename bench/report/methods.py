"""The tables of the methods' pages: the runs of each method, on all devices."""

from statistics import fmean
from typing import Any

from dfkd_fast import load_recipe
from dfkd_fast.recipe_files import shipped_recipes

from .cpu import by_seed, duration, mean_and_seeds
from .markdown import code, marker, table
from .results import Results

__all__ = ["METHODS", "method_of", "method_table", "sections"]

METHODS = {name: marker(f"runs of {name}", "bench/results/distill.jsonl") for name in ("dfad", "mad", "retain", "pre-dfkd")}
"""Markers by the name of a method's page."""
NOT_MEASURED = "Not measured yet."


def sections(results: Results) -> dict[str, dict[str, str]]:
    """The table of each method's page as Markdown, by the document's path and the table's marker."""
    runs = [(method_of(run["recipe"]), run) for run in results.runs]
    return {
        f"docs/methods/{name}.md": {begin: method_table([run for method, run in runs if method == name])} for name, begin in METHODS.items()
    }


def method_of(recipe: str) -> str | None:
    """The method that a shipped recipe configures, by its replay and update; None for any other recipe."""
    name = recipe.partition(" ")[0]  # "mnist-dfad (3 of 60 epochs)"
    if name not in shipped_recipes():
        return None
    method = load_recipe(name)
    if method.update.is_retain_acquire:
        return "retain"
    return {"none": "dfad", "ema_generator": "mad"}.get(method.replay.kind, "pre-dfkd")


def method_table(runs: list[dict[str, Any]]) -> str:
    """One row for each recipe and device: metrics in percent, means over the seeds."""
    titles = ("recipe", "metric", "teacher", "last epoch", "best epoch", "variance, last ¾", "largest drop", "time (s)", "device")
    rows = [
        (
            *(code(alike[0]["recipe"]), alike[0].get("metric", "top-1 accuracy")),
            f"{fmean(run['teacher_accuracy'] for run in alike):.2f}",
            mean_and_seeds([run["retention"]["last"] for run in alike]),
            *(_mean(alike, name) for name in ("best", "settled_variance", "largest_drop")),
            f"{fmean(map(duration, alike)):.0f}",
            alike[0]["device_name"],
        )
        for alike in by_seed(runs)
    ]
    return table(titles, rows) if rows else NOT_MEASURED


def _mean(runs: list[dict[str, Any]], name: str) -> str:
    values = [run["retention"].get(name) for run in runs]
    return "–" if None in values else f"{fmean(values):.2f}"
