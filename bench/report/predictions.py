"""The table of predicted steps in docs/gpu.md."""

from collections.abc import Iterable, Mapping, Sequence

from ..end_to_end.contenders import is_engine
from ..model import CASE, TENSOR_CORE_KINDS
from .markdown import EMPTY, code, marker, table
from .results import Results, grouped

__all__ = ["PREDICTIONS", "prediction_table"]

PREDICTIONS = marker("predicted steps", "bench/results/model-*.csv")
Row = Mapping[str, str]


def prediction_table(results: Results) -> str:
    """One row for each kind of step of each case, with the time of a whole iteration and, if there is one, the measured one."""
    titles = (
        *(
            "recipe",
            "settings",
            "batch",
            "device",
            "step",
            "kernels",
            "convolutions (ms)",
            "rest (ms)",
            "rest ÷ convolutions",
            "step (ms)",
            "memory (GB)",
        ),
        *("iteration (ms)", "measured kernels of an iteration"),
    )
    measured = [row for row in results.rows("end-to-end", "gpu") if is_engine(row["contender"]) and row["kernel_seconds"]]
    lines = []
    for alike in grouped(results.rows("model", "gpu"), CASE):
        recipe, settings, batch_size, _, device = case = [alike[0][name] for name in CASE]
        iteration = sum(float(row["ms"]) for row in alike)
        for index, rows in enumerate(grouped(alike, ("phase",))):
            phase, steps = rows[0]["phase"], int(rows[0]["steps"])
            ms = sum(float(row["ms"]) for row in rows) / steps
            convolutions = sum(float(row["ms"]) for row in rows if row["kind"] in TENSOR_CORE_KINDS) / steps
            of_case = (code(recipe), settings or EMPTY, batch_size, device.removesuffix(" (model)")) if not index else ("", "", "", "")
            of_iteration = (f"{iteration:.2f}", EMPTY if settings else _measured(case, measured)) if not index else ("", "")
            lines.append(
                (
                    *(*of_case, f"{phase} × {steps}", f"{sum(int(row['kernels']) for row in rows) / steps:.0f}"),
                    *(f"{convolutions:.3f}", f"{ms - convolutions:.3f}", f"{100 * (ms - convolutions) / convolutions:.0f} %", f"{ms:.3f}"),
                    f"{float(rows[0]['peak_gb']) + float(rows[0]['resident_gb']):.2f}",
                    *of_iteration,
                )
            )
    return table(titles, lines) if lines else "Nothing was predicted yet."


def _measured(case: Sequence[str], rows: Iterable[Row]) -> str:
    recipe, _, batch_size, precision, device = case
    found = [
        f"{float(row['kernels_per_iteration']):.0f} in {1e3 * float(row['kernel_seconds']):.2f} ms ({code(row['commit'])})"
        for row in rows
        if (row["recipe"], row["batch_size"], row["precision"]) == (recipe, batch_size, precision)
        and row["device"].endswith(device.removesuffix(" (model)"))
    ]
    return ", ".join(found) or EMPTY
