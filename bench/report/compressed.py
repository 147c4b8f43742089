"""The table of compressed networks, from the folders of their runs."""

import json
from typing import Any, NamedTuple

from dfkd_fast.recipe import Recipe, recipe_from_toml

from ..provenance import ROOT
from .cpu import duration
from .markdown import EMPTY, code, marker, table

__all__ = ["COMPRESSED", "FOLDER", "compressed_table"]

FOLDER = ROOT / "bench" / "results" / "compress"
COMPRESSED = marker("compressed networks", "bench/results/compress")
TITLES = (
    *("network", "metric", "bits", "seed", "network's own", "calibrated", "**trained, last epoch**", "best epoch", "agreement, real"),
    *("agreement, generated", "student steps", "time (min)", "size (MB)", "device"),
)


class CompressedRun(NamedTuple):
    """What a run of ``dfkd-fast compress`` left."""

    recipe: Recipe
    summary: dict[str, Any]
    evaluation: dict[str, Any]
    """Of the student, written by ``dfkd-fast evaluate --json``; empty if it did not run."""


def compressed_table() -> str:
    """One row for each run, by network, then from many bits to few."""
    runs = []
    for path in FOLDER.glob("*/summary.json"):
        evaluation = path.with_name("evaluation.json")
        runs.append(
            CompressedRun(
                recipe_from_toml(path.with_name("recipe.toml").read_text(), str(path.with_name("recipe.toml"))),
                json.loads(path.read_text()),
                next(one for one in json.loads(evaluation.read_text()) if one["role"] == "student") if evaluation.is_file() else {},
            )
        )
    runs.sort(key=_order)
    return table(TITLES, map(_row, runs))


def _order(run: CompressedRun) -> tuple[str, int, int, int]:
    student = run.recipe.student
    return run.recipe.teacher.model, -student.weight_bits, -student.activation_bits, run.recipe.seed


def _row(run: CompressedRun) -> tuple[str, ...]:
    recipe, summary, quantized = run.recipe, run.summary, run.summary["quantized"]
    agreements = quantized["calibrated_agreement"], summary["agreement"]["last"]
    return (
        code(recipe.teacher.model),
        f"{summary['metric']} on {recipe.data.name}",
        quantized["bits"].removesuffix("a32"),
        str(recipe.seed),
        *(f"{value:.1f}" for value in (summary["teacher_accuracy"], quantized["calibrated_accuracy"])),
        f"**{summary['student_accuracy']['last']:.1f}**",
        f"{summary['student_accuracy']['best']:.1f}",
        f"{run.evaluation['agreement']['top1']:.1f}" if run.evaluation else EMPTY,
        " → ".join(f"{value:.1f}" for value in agreements),
        f"{recipe.loop.epochs * recipe.loop.iterations_per_epoch * recipe.loop.student_steps:,}",
        f"{duration(summary) / 60:.0f}",
        f"{quantized['teacher_bytes'] / 1e6:.2f} → {quantized['bytes'] / 1e6:.2f}",
        summary["device_name"],
    )
