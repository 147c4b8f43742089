"""Comparison of finished runs: a table and a plot."""

import json
import math
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from dfkd_fast.errors import DfkdError, first_line, short_repr
from dfkd_fast.files import check_output
from dfkd_fast.settings import FileName, Seed

from .folder import RunFolder, read_metrics
from .plots import MAX_MARKERS, axis_name, literal_label, save_figure

__all__ = ["COLUMNS", "FinishedRun", "check_plot", "plot_comparison", "read_run", "table_rows"]

COLUMNS = {
    "last": "last",
    "best": "best",
    "mean": "mean",
    "variance": "variance",
    "settled_mean": "mean,\nlast 75%",
    "settled_variance": "variance,\nlast 75%",
    "largest_drop": "largest\ndrop",
    "fraction_retained": "retained",
}
"""Fields of ``evaluation.Retention`` and their column titles."""
PLOT_SUFFIXES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".eps", ".ps")
LEGEND_CHARACTERS = 96
"""In a row of the legend."""
LEGEND_HANDLE = 8
"""Width of a line's sample in the legend, in characters."""
Percent = Annotated[float, Field(ge=0, le=100)]
Statistic = Annotated[float, Field(ge=0, le=10000)]
"""A percentage, or a difference or variance of percentages."""


@dataclass(frozen=True, config=ConfigDict(strict=True, allow_inf_nan=False))
class FinishedRun:
    """The results of a finished run, read from its folder."""

    path: Path
    recipe: FileName
    seed: Seed
    teacher_accuracy: Percent
    metric: str
    """Name of the metric that the accuracies are, such as "mIoU"."""
    retention: dict[str, Statistic]
    curve: Annotated[list[tuple[Annotated[int, Field(ge=0, le=2**31)], Percent]], Field(min_length=1)]
    """Pairs of epoch and student accuracy in percent; epoch 0 is a quantized student before its first step."""
    minutes: list[Annotated[float, Field(ge=0)] | None]
    """Duration of the training in minutes up to each point of the curve, without a teacher's training; None where it is not recorded."""
    settings: str = ""
    """The part of the recipe that is equal in repetitions of a run, as JSON; empty if the folder has no recipe."""


def read_run(path: Path) -> FinishedRun:
    """Read the results of a finished run from its folder.

    Raises:
        DfkdError: the folder has no finished run, the run was never evaluated, or a file is damaged.
    """
    folder = RunFolder(path)
    if not folder.summary.is_file():
        raise DfkdError(f"{path} is not a finished run (no {folder.summary.name})")
    file = folder.summary
    try:
        summary: dict[str, Any] = json.loads(file.read_text("utf-8"))
        if summary["retention"] is None:
            raise DfkdError(f"{path} was never evaluated: there is nothing to compare; use dfkd-fast evaluate")
        statistics = {name: summary["retention"][name] for name in COLUMNS}
        of_run = {name: summary[name] for name in ("recipe", "seed", "teacher_accuracy")}
        metric = summary.get("metric", "top-1 accuracy")
        file = folder.metrics
        calibration = folder.read_calibration()
        points: list[tuple[int, Any, float | None]] = [(0, calibration.get("accuracy"), calibration.get("seconds"))]
        elapsed = 0.0
        for epoch in read_metrics(file):
            number, accuracy = epoch["epoch"], epoch["student_accuracy"]
            elapsed += epoch.get("seconds", math.nan)
            points.append((number, accuracy, None if math.isnan(elapsed) else elapsed))
        points = [point for point in points if point[1] is not None]
        curve = [(number, accuracy) for number, accuracy, _ in points]
        minutes = [None if seconds is None else seconds / 60 for _, _, seconds in points]
        file = folder.recipe
        settings = _settings(file.read_text("utf-8")) if file.is_file() else ""
        return FinishedRun(path, metric=metric, retention=statistics, curve=curve, minutes=minutes, settings=settings, **of_run)
    except DfkdError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DfkdError(f"{path} cannot be read as a run: {_damage(file, error)}") from error


def _settings(recipe: str) -> str:
    """Returns a recipe without its seed and without keys that do not change results, such as the path of its data."""
    content = tomllib.loads(recipe)
    relevant = {name: value for name, value in content.items() if name not in ("seed", "description", "provenance", "report")}
    if isinstance(relevant.get("data"), dict):
        relevant["data"] = {key: value for key, value in relevant["data"].items() if key not in ("root", "workers")}
    return json.dumps(relevant, sort_keys=True, default=str)


def _damage(file: Path, error: BaseException) -> str:
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        return f"{'.'.join(map(str, problem['loc']))} = {short_repr(problem['input'])}: {problem['msg']}"
    return f"{file.name}: " + (f"key {error} is missing" if isinstance(error, KeyError) else f"{type(error).__name__} {first_line(error)}")


def table_rows(runs: Sequence[FinishedRun]) -> list[list[str]]:
    """Returns one row per run, and one with the mean of the runs that differ only in their seeds.

    The cells of a row are the run's name, the teacher's accuracy and ``COLUMNS``.
    """
    rows = []
    for name, alike in _repetitions(runs):
        rows += [_row(f"{name}, seed {run.seed}", [run]) for run in alike]
        if len(alike) > 1:
            rows.append(_row(f"{name}, mean of {len(alike)}", alike))
    return rows


def _row(name: str, runs: Sequence[FinishedRun]) -> list[str]:
    values = [[run.teacher_accuracy, *(run.retention[column] for column in COLUMNS)] for run in runs]
    return [name, *(f"{fmean(column):.2f}" for column in zip(*values, strict=True))]


def check_plot(option: str, path: Path) -> None:
    """Check that a plot can be written to the path of a command-line option.

    Raises:
        DfkdError: the path cannot be written, or its suffix is not one of an image format.
    """
    check_output(option, path)
    if path.suffix.lower() not in PLOT_SUFFIXES and (path.suffix or not path.exists()):
        raise DfkdError(f"{option} {path}: the suffix must be one of {', '.join(PLOT_SUFFIXES)}")


def plot_comparison(runs: Sequence[FinishedRun], path: Path, *, over_minutes: bool = False) -> None:
    """Plot the accuracy curves of runs, one colour per recipe, and below them bar charts of the retention statistics.

    A bar is the mean over the runs of a recipe, in the colour and the order of the legend; each run is a dot.

    Args:
        runs: in the order of the legend.
        path: of the image file.
        over_minutes: whether accuracy is plotted over minutes instead of epochs; points whose time is not recorded are left out.

    Raises:
        DfkdError: a run has no point whose time is recorded.
    """
    repetitions = _repetitions(runs)
    groups = [alike for _, alike in repetitions]
    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic([["curves"] * 3, ["settled_variance", "largest_drop", "last"]], height_ratios=[3, 2])
    names, handles = [literal_label(name) for name, _ in repetitions], []
    for index, alike in enumerate(groups):
        lines = []
        for run in alike:
            points = _over_minutes(run) if over_minutes else run.curve
            marker = "." if len(points) <= MAX_MARKERS else ""
            lines += axes["curves"].plot(*zip(*points, strict=True), color=f"C{index}", alpha=0.8, linewidth=1, marker=marker, markersize=4)
        handles.append(lines[0])
        for name, title in (("settled_variance", "Variance"), ("largest_drop", "Largest drop"), ("last", "Last epoch")):
            values = [run.retention[name] for run in alike]
            axes[name].barh(index, fmean(values), color=f"C{index}", alpha=0.4)
            axes[name].plot(values, [index] * len(values), "o", color=f"C{index}", markersize=3)
            axes[name].set(title=title, yticks=[])
    axes["curves"].set(xlabel="Minutes" if over_minutes else "Epoch", ylabel=_metric_label(runs))
    axes["curves"].xaxis.set_major_locator(MaxNLocator(integer=True))
    if over_minutes:
        axes["curves"].set_xlim(left=0)  # what comes before the first evaluation takes time, too
    columns = LEGEND_CHARACTERS // (max(map(len, names)) + LEGEND_HANDLE)
    figure.legend(handles, names, loc="outside upper left", ncols=max(1, min(len(names), 3, columns)), frameon=False)
    axes["settled_variance"].set(xlabel="percent², last 75 % of the epochs")
    axes["largest_drop"].set(xlabel="percentage points")
    lowest = min(run.retention["last"] for run in runs)
    axes["last"].set(xlabel="%", xlim=(max(0.0, lowest - 5), None))
    for name, axis in axes.items():
        axis.grid(alpha=0.3)
        if name != "curves":
            axis.invert_yaxis()  # the order of the legend
    save_figure(figure, path)


def _over_minutes(run: FinishedRun) -> list[tuple[float, float]]:
    """Returns pairs of minutes and accuracy."""
    points = [(minutes, accuracy) for minutes, (_, accuracy) in zip(run.minutes, run.curve, strict=True) if minutes is not None]
    if not points:
        raise DfkdError(f"--minutes: {run.path} has no seconds in {RunFolder(run.path).metrics.name}")
    return points


def _repetitions(runs: Sequence[FinishedRun]) -> list[tuple[str, list[FinishedRun]]]:
    """Returns groups of runs that differ only in their seeds, each with its recipe's name, and a folder where names are ambiguous."""
    groups: dict[tuple[str, str], list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault((run.recipe, run.settings), []).append(run)
    named = Counter(recipe for recipe, _ in groups)
    folders = Counter(alike[0].path.name for alike in groups.values())

    def place(path: Path) -> str:
        return path.name if folders[path.name] == 1 else str(path)

    return [(recipe if named[recipe] == 1 else f"{recipe} in {place(alike[0].path)}", alike) for (recipe, _), alike in groups.items()]


def _metric_label(runs: Sequence[FinishedRun]) -> str:
    """Returns the metrics of the runs as an axis label."""
    metrics = dict.fromkeys(axis_name(run.metric) for run in runs)
    return literal_label(f"{next(iter(metrics))} (%)" if len(metrics) == 1 else "Different metrics, not comparable (%)")
