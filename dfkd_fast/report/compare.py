"""Finished runs side by side: one table and one picture."""

import json
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
from .pictures import plain, save_figure

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
Percent = Annotated[float, Field(ge=0, le=100)]
Figures = Annotated[float, Field(ge=0, le=10000)]
"""Of percents, their differences and their squares."""


@dataclass(frozen=True, config=ConfigDict(strict=True, allow_inf_nan=False))
class Finished:
    """What a finished run left."""

    path: Path
    recipe: FileName
    seed: Seed
    teacher_accuracy: Percent
    metric: str
    """What its accuracies are."""
    retention: dict[str, Figures]
    curve: Annotated[list[tuple[Annotated[int, Field(ge=1, le=2**31)], Percent]], Field(min_length=1)]
    """Epochs and the student's accuracy in percent."""
    settings: str = ""
    """All of its recipe that repetitions of a run have in common, as JSON; empty of a folder without one."""


def read_run(path: Path) -> Finished:
    """Read a run's folder.

    Raises:
        DfkdError: it holds no finished run, one that was never evaluated, or what no run writes.
    """
    folder = RunFolder(path)
    if not folder.summary.is_file():
        raise DfkdError(f"{path} holds no finished run (no {folder.summary.name})")
    file = folder.summary
    try:
        summary: dict[str, Any] = json.loads(file.read_text("utf-8"))
        if summary["retention"] is None:
            raise DfkdError(f"{path} was never evaluated: there is nothing to compare")
        statistics = {name: summary["retention"][name] for name in COLUMNS}
        of_run = {name: summary[name] for name in ("recipe", "seed", "teacher_accuracy")}
        metric = summary.get("metric", "top-1 accuracy")
        file = folder.metrics
        curve = [(epoch["epoch"], epoch["student_accuracy"]) for epoch in read_metrics(file) if epoch["student_accuracy"] is not None]
        file = folder.recipe
        settings = _settings(file.read_text("utf-8")) if file.is_file() else ""
        return Finished(path, metric=metric, retention=statistics, curve=curve, settings=settings, **of_run)
    except DfkdError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DfkdError(f"{path} holds no run that can be read: {_damage(file, error)}") from error


def _settings(recipe: str) -> str:
    """A recipe but for its seed and what changes no figure, such as where its data lies."""
    content = tomllib.loads(recipe)
    kept = {name: value for name, value in content.items() if name not in ("seed", "description", "provenance", "report")}
    for section, keys in (("data", ("root", "workers")), ("teacher", ("weights", "weights_key"))):
        if isinstance(kept.get(section), dict):
            kept[section] = {key: value for key, value in kept[section].items() if key not in keys}
    return json.dumps(kept, sort_keys=True, default=str)


def _damage(file: Path, error: BaseException) -> str:
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        return f"{'.'.join(map(str, problem['loc']))} = {short_repr(problem['input'])}: {problem['msg']}"
    return f"{file.name}: " + (f"no {error}" if isinstance(error, KeyError) else f"{type(error).__name__} {first_line(error)}")


def table_rows(runs: Sequence[Finished]) -> list[list[str]]:
    """A row a run, and one with the mean of those that differ in their seeds alone; first its name, then the teacher and ``COLUMNS``."""
    rows = []
    for name, alike in _repetitions(runs):
        rows += [_row(f"{name}, seed {run.seed}", [run]) for run in alike]
        if len(alike) > 1:
            rows.append(_row(f"{name}, mean of {len(alike)}", alike))
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
    repetitions = _repetitions(runs)
    groups = [alike for _, alike in repetitions]
    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic([["curves"] * 3, ["settled_variance", "largest_drop", "last"]], height_ratios=[3, 2])
    names, handles = [plain(name) for name, _ in repetitions], []
    for index, alike in enumerate(groups):
        lines = [axes["curves"].plot(*zip(*run.curve, strict=True), color=f"C{index}", alpha=0.8, linewidth=1)[0] for run in alike]
        handles.append(lines[0])
        for name, title in (("settled_variance", "variance"), ("largest_drop", "largest drop"), ("last", "last epoch")):
            values = [run.retention[name] for run in alike]
            axes[name].barh(index, fmean(values), color=f"C{index}", alpha=0.4)
            axes[name].plot(values, [index] * len(values), "o", color=f"C{index}", markersize=3)
            axes[name].set(title=title, yticks=[])
    axes["curves"].set(xlabel="epoch", ylabel=plain(f"{', '.join(dict.fromkeys(run.metric for run in runs))} (%)"))
    axes["curves"].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes["curves"].legend(handles, names, loc="lower right")
    axes["settled_variance"].set(xlabel="percent², last ¾ of the epochs", yticks=range(len(groups)))
    axes["settled_variance"].set_yticklabels(names)
    axes["largest_drop"].set(xlabel="points")
    lowest = min(run.retention["last"] for run in runs)
    axes["last"].set(xlabel="%", xlim=(max(0.0, lowest - 5), None))
    for axis in axes.values():
        axis.grid(alpha=0.3)
    save_figure(figure, path)


def _repetitions(runs: Sequence[Finished]) -> list[tuple[str, list[Finished]]]:
    """Runs that differ in their seeds alone, and what to call them: the recipe, with the first one's folder where others share its name."""
    groups: dict[tuple[str, str], list[Finished]] = {}
    for run in runs:
        groups.setdefault((run.recipe, run.settings), []).append(run)
    named = Counter(recipe for recipe, _ in groups)
    return [(recipe if named[recipe] == 1 else f"{recipe} in {alike[0].path}", alike) for (recipe, _), alike in groups.items()]
