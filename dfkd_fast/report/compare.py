"""Finished runs side by side: one table and one picture."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dfkd_fast.errors import DfkdError, first_line
from dfkd_fast.files import check_output, replacing

from .folder import RunFolder, read_metrics

__all__ = ["COLUMNS", "Finished", "check_picture", "draw_comparison", "read_run", "table_rows"]

COLUMNS = {
    "last": "last",
    "best": "best",
    "mean": "mean",
    "variance": "var",
    "settled_mean": "mean ¾",
    "settled_variance": "var ¾",
    "largest_drop": "drop",
    "fraction_retained": "kept",
}
"""Fields of ``evaluation.Retention`` and what the table calls them."""


PICTURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".eps", ".ps")


@dataclass(frozen=True)
class Finished:
    """What a finished run left."""

    path: Path
    recipe: str
    seed: int
    teacher_accuracy: float
    metric: str
    """What its accuracies are."""
    retention: dict[str, float]
    curve: list[tuple[int, float]]
    """Epochs and the student's accuracy in percent."""

    @property
    def name(self) -> str:
        """Of its row."""
        return f"{self.recipe}, seed {self.seed}"


def read_run(path: Path) -> Finished:
    """Read a run's folder.

    Raises:
        DfkdError: it holds no finished run, or one that was never evaluated.
    """
    folder = RunFolder(path)
    if not folder.summary.is_file():
        raise DfkdError(f"{path} holds no finished run (no {folder.summary.name})")
    try:
        summary: dict[str, Any] = json.loads(folder.summary.read_text())
        epochs = read_metrics(folder.metrics)
        curve = [(epoch["epoch"], epoch["student_accuracy"]) for epoch in epochs if epoch["student_accuracy"] is not None]
        if summary["retention"] is None:
            raise DfkdError(f"{path} was never evaluated: there is nothing to compare")
        metric = summary.get("metric", "top-1 accuracy")
        return Finished(path, summary["recipe"], summary["seed"], summary["teacher_accuracy"], metric, summary["retention"], curve)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DfkdError(f"{path} holds no run that can be read: {type(error).__name__} {first_line(error)}") from error


def table_rows(runs: Sequence[Finished]) -> list[list[str]]:
    """A row a run, and one with the means of a recipe that has several; first its name, then the teacher and ``COLUMNS``."""
    rows = []
    for alike in _by_recipe(runs):
        rows += [_row(run.name, [run]) for run in alike]
        if len(alike) > 1:
            rows.append(_row(f"{alike[0].recipe}, mean of {len(alike)}", alike))
    return rows


def _row(name: str, runs: Sequence[Finished]) -> list[str]:
    figures = [[run.teacher_accuracy, *(run.retention[column] for column in COLUMNS)] for run in runs]
    return [name, *(f"{fmean(column):.2f}" for column in zip(*figures, strict=True))]


def check_picture(option: str, path: Path) -> None:
    """Raise a :class:`DfkdError` unless a picture can be written to a path that an option names."""
    check_output(option, path)
    if path.suffix.lower() not in PICTURES and (path.suffix or not path.exists()):
        raise DfkdError(f"{option} {path}: a picture's name ends in {', '.join(PICTURES)}")


def draw_comparison(runs: Sequence[Finished], path: Path) -> None:
    """Accuracy over epochs, a colour a recipe, and below it how steady each recipe was: a dot a run, a bar their mean."""
    groups = _by_recipe(runs)
    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic([["curves"] * 3, ["settled_variance", "largest_drop", "last"]], height_ratios=[3, 2])
    for index, alike in enumerate(groups):
        for run in alike:
            label = alike[0].recipe if run is alike[0] else None
            axes["curves"].plot(*zip(*run.curve, strict=True), color=f"C{index}", alpha=0.8, linewidth=1, label=label)
        for name, title in (("settled_variance", "variance"), ("largest_drop", "largest drop"), ("last", "last epoch")):
            values = [run.retention[name] for run in alike]
            axes[name].barh(index, fmean(values), color=f"C{index}", alpha=0.4)
            axes[name].plot(values, [index] * len(values), "o", color=f"C{index}", markersize=3)
            axes[name].set(title=title, yticks=[])
    axes["curves"].set(xlabel="epoch", ylabel=f"{', '.join(dict.fromkeys(run.metric for run in runs))} (%)")
    axes["curves"].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes["curves"].legend(loc="lower right")
    axes["settled_variance"].set(xlabel="percent², last ¾ of the epochs", yticks=range(len(groups)))
    axes["settled_variance"].set_yticklabels([alike[0].recipe for alike in groups])
    axes["largest_drop"].set(xlabel="points")
    lowest = min(run.retention["last"] for run in runs)
    axes["last"].set(xlabel="%", xlim=(max(0.0, lowest - 5), None))
    for axis in axes.values():
        axis.grid(alpha=0.3)
    with replacing(path) as part:
        figure.savefig(part, dpi=120, format=path.suffix[1:].lower() or "png")


def _by_recipe(runs: Sequence[Finished]) -> list[list[Finished]]:
    groups: dict[str, list[Finished]] = {}
    for run in runs:
        groups.setdefault(run.recipe, []).append(run)
    return list(groups.values())
