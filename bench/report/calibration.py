"""The table of quantized copies before any training."""

from collections.abc import Iterable

from .cpu import NOT_MEASURED
from .markdown import code, marker, table
from .results import Results

__all__ = ["CALIBRATION", "calibration_table", "sections"]

CALIBRATION = marker("calibrated copies", "bench/results/calibration-*.csv")
COLUMNS = {
    ("none", "generated"): "rounding only",
    ("batch norms", "generated"): "batch norms estimated again, generated",
    ("batch norms", "real"): "estimated again, real",
    ("calibrate", "noise"): "calibrated, noise",
    ("calibrate", "generated"): "**calibrated, generated**",
    ("calibrate", "real"): "calibrated, real",
}


def sections(results: Results) -> dict[str, str]:
    """The table as Markdown, by its marker."""
    return {CALIBRATION: calibration_table([*results.rows("calibration", "cpu"), *results.rows("calibration", "gpu")])}


def calibration_table(rows: Iterable[dict[str, str]]) -> str:
    """One row for each network, bits, seed and device: accuracy, and in brackets the agreement with the network, for each correction."""
    measured: dict[tuple[str, ...], dict[tuple[str, str], dict[str, str]]] = {}
    for row in rows:
        key = row["network"], row["teacher_accuracy"], row["bits"], row["pretraining"], row["seed"], row["device"]
        measured.setdefault(key, {})[row["correction"], row["images"]] = row
    cells = [
        (code(network), f"{float(accuracy):.1f}", bits, *(_cell(by_source.get(source)) for source in COLUMNS), steps, seed, device)
        for (network, accuracy, bits, steps, seed, device), by_source in measured.items()
    ]
    titles = ("network", "its accuracy", "bits", *COLUMNS.values(), "generator steps", "seed", "device")
    return table(titles, cells) if cells else NOT_MEASURED


def _cell(row: dict[str, str] | None) -> str:
    return "" if row is None else f"{float(row['accuracy']):.1f} ({float(row['agreement']):.1f})"
