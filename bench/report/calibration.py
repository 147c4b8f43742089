"""The tables of quantized copies before any training."""

from collections.abc import Iterable
from typing import NamedTuple

from .cpu import NOT_MEASURED
from .markdown import EMPTY, code, marker, table
from .results import Results

__all__ = ["CALIBRATION", "PEER", "calibration_table", "peer_table", "sections"]

CALIBRATION = marker("calibrated copies", "bench/results/calibration-*.csv")
PEER = marker("copies quantized by PyTorch", "bench/results/calibration-*.csv")
COLUMNS = {
    ("none", "generated"): "rounding only",
    ("batch norms", "generated"): "batch norms estimated again, generated",
    ("batch norms", "real"): "estimated again, real",
    ("calibrate", "noise"): "calibrated, noise",
    ("calibrate", "generated"): "**calibrated, generated**",
    ("calibrate", "real"): "calibrated, real",
}


class Case(NamedTuple):
    """What the corrections of a table have in common."""

    network: str
    accuracy: str
    bits: str
    steps: str
    seed: str
    device: str


def sections(results: Results) -> dict[str, str]:
    """The tables as Markdown, by their markers."""
    rows = [*results.rows("calibration", "cpu"), *results.rows("calibration", "gpu")]
    return {CALIBRATION: calibration_table(rows), PEER: peer_table(rows)}


def calibration_table(rows: Iterable[dict[str, str]]) -> str:
    """One row for each network, bits, seed and device: accuracy, and in brackets the agreement with the network, for each correction."""
    cells = [
        (
            *(code(case.network), f"{float(case.accuracy):.1f}", case.bits),
            *(_cell(measured.get(source)) for source in COLUMNS),
            *(case.steps, case.seed, case.device),
        )
        for case, measured in _cases(rows).items()
        if not COLUMNS.keys().isdisjoint(measured)
    ]
    titles = ("network", "its accuracy", "bits", *COLUMNS.values(), "generator steps", "seed", "device")
    return table(titles, cells) if cells else NOT_MEASURED


def peer_table(rows: Iterable[dict[str, str]]) -> str:
    """PyTorch's quantization beside this project's, in the same cells: one row for each case and source of images."""
    cells = [
        (
            *(code(case.network), f"{float(case.accuracy):.1f}", case.bits, images),
            *(_cell(measured.get((correction, images))) for correction in ("PT2E", "calibrate")),
            *(case.steps, case.seed, measured["PT2E", images]["torchao"], case.device),
        )
        for case, measured in _cases(rows).items()
        for images in ("noise", "generated", "real")
        if ("PT2E", images) in measured
    ]
    titles = ("network", "its accuracy", "bits", "images", "PyTorch's PT2E", "calibrated", "generator steps", "seed", "torchao", "device")
    return table(titles, cells) if cells else NOT_MEASURED


def _cases(rows: Iterable[dict[str, str]]) -> dict[Case, dict[tuple[str, str], dict[str, str]]]:
    """Returns the rows of each case by correction and images."""
    cases: dict[Case, dict[tuple[str, str], dict[str, str]]] = {}
    for row in rows:
        case = Case(row["network"], row["teacher_accuracy"], row["bits"], row["pretraining"], row["seed"], row["device"])
        cases.setdefault(case, {})[row["correction"], row["images"]] = row
    return cases


def _cell(row: dict[str, str] | None) -> str:
    return EMPTY if row is None else f"{float(row['accuracy']):.1f} ({float(row['agreement']):.1f})"
