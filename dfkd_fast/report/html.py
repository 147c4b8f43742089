"""The report of a finished run: one self-contained HTML page."""

import base64
import io
import json
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
from PIL import Image

from dfkd_fast.data import palette
from dfkd_fast.engine import Epoch
from dfkd_fast.errors import first_line
from dfkd_fast.log import LOGGER
from dfkd_fast.recipe import Recipe, load_recipe, recipe_to_dict
from dfkd_fast.recipe_files import shipped_recipes

from .folder import RunFolder, read_metrics
from .plots import curves_as_svg

__all__ = ["render_report", "write_report"]

LATENTS, SEGMENTATION_LATENTS = 6, 2
"""Rows of samples in ``samples.png`` and in the report."""
MAX_TILE = 128
"""Pixels of a sample's side in the report; larger ones are downscaled."""
PIXELATED = 64
"""Pixels of a side up to which a sample is stored without loss and enlarged without interpolation."""
STATISTICS = (
    ("last", "Student, last epoch", "%"),
    ("best", "Student, best epoch (selected on these images)", "%"),
    ("mean", "Student, mean over the epochs", "%"),
    ("variance", "Student, variance over the epochs", "percent²"),
    ("settled_mean", "Student, mean over the last 75 % of the epochs", "%"),
    ("settled_variance", "Student, variance over the last 75 % of the epochs", "percent²"),
    ("largest_drop", "Student, largest drop from a previous peak", "points"),
)
"""Fields of ``evaluation.Retention``, their names and units."""
PHASES = {
    "teacher": "Teacher training",
    "compilation": "Compilation of the networks",
    "generator": "Generator, pretraining and steps",
    "calibration": "Calibration of the quantized student",
    "student": "Student steps",
    "evaluation": "Evaluation",
}
"""Keys of a summary's ``seconds`` and their names."""
PACKAGES = {"dfkd_fast": "dfkd-fast", "python": "Python", "torch": "PyTorch", "torchvision": "torchvision", "cuda": "CUDA (PyTorch build)"}
"""Keys of a summary's ``versions`` and their names."""


def write_report(folder: RunFolder) -> None:
    """Write ``samples.png`` and ``report.html`` of a finished run from the other files of its folder.

    An error is logged as a warning: a run is not lost because its report cannot be written.
    """
    if not folder.writes:
        return
    try:
        recipe = load_recipe(str(folder.recipe))
        folder.plot_samples_over_time(recipe.generated_size, _is_segmentation(recipe), _latents(recipe))
        folder.write_text(folder.report, render_report(folder))
    except Exception as error:  # whatever a library raises for a file that was damaged or removed meanwhile
        LOGGER.warning("%s was not written: %s: %s", folder.report, type(error).__name__, first_line(error))


def render_report(folder: RunFolder) -> str:
    """Returns the report of a finished run as HTML, from the files of its folder.

    Raises:
        DfkdError: its recipe is invalid.
        OSError: a file cannot be read.
        ValueError, KeyError: a file is not one that a run writes.
    """
    recipe = load_recipe(str(folder.recipe))
    summary = json.loads(folder.summary.read_text("utf-8"))
    metric = summary.get("metric", "top-1 accuracy")
    epochs = list(_epochs(folder))
    shipped = load_recipe(recipe.name) if recipe.name in shipped_recipes() else None
    changes = _changes(shipped, recipe) if shipped else []
    images = folder.read_samples_over_time(recipe.generated_size, _is_segmentation(recipe), _latents(recipe))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((resources.files("dfkd_fast.report") / "report.html.jinja").read_text("utf-8"))
    return template.render(
        recipe=recipe,
        summary=summary,
        metric=metric,
        images=recipe.data.evaluated_on if recipe.data.holdout else "the test set",
        device=summary.get("device_name") or summary["device"],
        precision=summary.get("precision", recipe.engine.precision),
        date=time.strftime("%Y-%m-%d"),
        last=epochs[-1].number if epochs else 0,
        statistics=STATISTICS,
        panels=curves_as_svg(epochs, summary["teacher_accuracy"], metric, folder.calibrated(epochs)),
        samples=[(epoch, _data_uri(column)) for epoch, column in images],
        latents=_latents(recipe),
        pixelated=recipe.generated_size <= PIXELATED,
        segmentation=_is_segmentation(recipe),
        phases=_phases(summary["seconds"]),
        total=_duration(summary["seconds"]["total"]),
        memory=_bytes(summary["peak_memory_bytes"]),
        memory_by_phase={PHASES.get(name, name): _bytes(size) for name, size in (summary.get("peak_memory_bytes_by_phase") or {}).items()},
        versions={PACKAGES.get(key, key): version for key, version in summary["versions"].items() if version},
        iou=summary.get("iou") or {},
        colours=_class_colours(recipe),
        notes=summary.get("notes", summary.get("remarks", [])),
        shipped=shipped is not None,
        changes=changes,
        command=_command(recipe, changes, shipped is not None),
        toml=folder.recipe.read_text("utf-8"),
    )


def _epochs(folder: RunFolder) -> Iterator[Epoch]:
    for record in read_metrics(folder.metrics):
        yield Epoch(
            record["epoch"],
            record.get("seconds", 0.0),
            record.get("losses", {}),
            record["student_accuracy"],
            record.get("unaveraged_accuracy"),
            record.get("agreement"),
            relative_bn_moments=record.get("relative_bn_moments"),
        )


def _is_segmentation(recipe: Recipe) -> bool:
    return recipe.data.task == "segmentation"


def _latents(recipe: Recipe) -> int:
    return min(SEGMENTATION_LATENTS if _is_segmentation(recipe) else LATENTS, recipe.report.samples)


def _class_colours(recipe: Recipe) -> list[str]:
    """Returns CSS colours of the classes' label maps."""
    return [f"rgb({red} {green} {blue})" for red, green, blue in palette(recipe.data).tolist()] if _is_segmentation(recipe) else []


def _data_uri(images: Sequence[Image.Image]) -> str:
    """Returns images of one size, stacked vertically, as a WebP file in a data URI."""
    side = min(images[0].width, MAX_TILE)
    column = Image.new("RGB", (side, len(images) * (side + 2) - 2), "#16181d")
    for row, image in enumerate(images):
        column.paste(image if image.width == side else image.resize((side, side)), (0, row * (side + 2)))
    file = io.BytesIO()
    column.save(file, "WEBP", lossless=side <= PIXELATED, quality=85)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _phases(seconds: Mapping[str, float]) -> list[tuple[str, str, str, float]]:
    """Returns key, name, duration and percentage of the total for each phase, and for the time outside of them."""
    known = {key: seconds[key] for key in PHASES if seconds.get(key)}
    other = seconds["total"] - sum(known.values())
    parts = [(key, PHASES[key], value) for key, value in known.items()] + ([("other", "Other", other)] if other > 0 else [])
    whole = sum(value for _, _, value in parts) or 1.0
    return [(key, name, _duration(value), 100 * value / whole) for key, name, value in parts]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _changes(shipped: Recipe, recipe: Recipe) -> list[tuple[str, str, str]]:
    """Returns key, shipped value and value of the run, both as TOML, where a run's recipe differs from the shipped one."""
    before, after = dict(_values(recipe_to_dict(shipped))), dict(_values(recipe_to_dict(recipe)))
    keys = [key for key in before | after if before.get(key) != after.get(key)]
    return [(key, before.get(key, ""), after.get(key, "")) for key in keys if key.partition(".")[0] not in ("description", "provenance")]


def _values(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _values(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False)  # TOML writes these the same way


def _command(recipe: Recipe, changes: Sequence[tuple[str, str, str]], shipped: bool) -> str:
    """Returns the shell command that repeats a run."""
    if not shipped:
        return "dfkd-fast distill recipe.toml"
    return " \\\n    ".join(
        [f"dfkd-fast distill {shlex.quote(recipe.name)}", *(f"--set {shlex.quote(f'{key}={value}')}" for key, _, value in changes)]
    )
