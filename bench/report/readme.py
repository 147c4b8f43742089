"""The README's tables of runs, whole iterations, loaders and kernels on a CPU."""

from collections.abc import Iterable
from statistics import fmean
from typing import Any

from ..end_to_end.rows import SPEEDUPS
from .figures import Figures, is_gpu
from .markdown import code, table

__all__ = [
    "command",
    "end_to_end_table",
    "evaluation_table",
    "kernel_table",
    "methods_table",
    "run_table",
    "sections",
    "segmentation_table",
]

RUNS = "<!-- made by python -m bench.report from bench/results/distill.jsonl -->"
SEGMENTATION = "<!-- made by python -m bench.report from the segmenters in bench/results/distill.jsonl -->"
METHODS = "<!-- made by python -m bench.report from bench/results/methods-*.csv -->"
END_TO_END = "<!-- made by python -m bench.report from bench/results/end-to-end-*.csv -->"
EVALUATION = "<!-- made by python -m bench.report from bench/results/evaluation-*.csv -->"
KERNELS = "<!-- made by python -m bench.report from bench/results/micro-*.csv -->"
NOT_MEASURED = "Not measured yet."
USUAL_VARIANTS = ("", "both", "plain")  # of a kernel, which need not be named


def sections(figures: Figures) -> dict[str, str]:
    """Every table by the line it stands under in the README."""
    runs = [entry for entry in figures.runs if not is_gpu(entry["device_name"])]
    return {
        RUNS: run_table([entry for entry in runs if not _segments(entry)]),
        SEGMENTATION: segmentation_table([entry for entry in runs if _segments(entry)]),
        METHODS: methods_table(figures.rows("methods", "cpu")),
        END_TO_END: end_to_end_table(figures.rows("end-to-end", "cpu")),
        EVALUATION: evaluation_table(figures.rows("evaluation", "cpu")),
        KERNELS: kernel_table(figures.rows("micro", "cpu")),
    }


def run_table(entries: list[dict[str, Any]]) -> str:
    """One row for each recipe and device: means over its seeds, and what may hide behind a mean seed by seed."""
    titles = ("command", "seeds", "teacher", "last", "best", "mean", "variance", "variance, last ¾", "largest drop", "seconds", "device")
    rows = []
    for alike in _grouped(entries):
        retained = [entry["retention"] for entry in alike]
        cells = [
            command(alike[0]),
            ", ".join(str(entry["seed"]) for entry in alike),
            _each([entry["teacher_accuracy"] for entry in alike]),
            _each([one["last"] for one in retained]),
            *(f"{fmean(one[name] for one in retained):.2f}" for name in ("best", "mean", "variance")),
            _each([one["settled_variance"] for one in retained]),
            _each([one["largest_drop"] for one in retained]),
            f"{fmean(entry['seconds']['total'] for entry in alike):.0f}",
            alike[0]["device_name"],
        ]
        rows.append(cells)
    return table(titles, rows)


def segmentation_table(entries: list[dict[str, Any]]) -> str:
    """One row for each recipe and device, of runs with per-pixel labels: means over the seeds."""
    if not entries:
        return NOT_MEASURED
    titles = (
        *("command", "seeds", "teacher", "last", "best", "last of the teacher's", "largest drop"),
        *("seconds, teacher's", "student's", "device"),
    )
    rows = []
    for alike in _grouped(entries):
        shares = [entry["retention"]["last"] / entry["teacher_accuracy"] for entry in alike]
        cells = [
            command(alike[0]),
            ", ".join(str(entry["seed"]) for entry in alike),
            _each([entry["teacher_accuracy"] for entry in alike]),
            _each([entry["retention"]["last"] for entry in alike]),
            _each([entry["retention"]["best"] for entry in alike]),
            f"{100 * fmean(shares):.1f} %",
            _each([entry["retention"]["largest_drop"] for entry in alike]),
            f"{fmean(entry['seconds']['teacher'] for entry in alike):.0f}",
            f"{fmean(sum(entry['seconds'][phase] for phase in ('generator', 'student', 'evaluation')) for entry in alike):.0f}",
            alike[0]["device_name"],
        ]
        rows.append(cells)
    return table(titles, rows)


def _segments(entry: dict[str, Any]) -> bool:
    return entry.get("metric") == "mIoU"


def command(entry: dict[str, Any]) -> str:
    """The command line of a run, the same for all seeds."""
    line = entry["command"].replace(f" --seed {entry['seed']}", " --seed N")
    return code(line, len(line))


def _grouped(entries: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault((command(entry), entry["device_name"]), []).append(entry)
    return list(groups.values())


def _each(values: list[float]) -> str:
    """The mean, and in brackets every seed's."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"**{fmean(values):.2f}** ({', '.join(f'{value:.2f}' for value in values)})"


def methods_table(rows: Iterable[dict[str, str]]) -> str:
    """Time and memory of an iteration, beside those of the first recipe."""
    titles = ("recipe", "fresh + replayed", "ms an iteration", "× the first", "peak MiB", "over the first", "device")
    cells = [
        (
            *(f"`{row['recipe']}`", f"{row['fresh_rows']} + {row['replayed_rows']}", f"{float(row['iteration_ms']):.1f}"),
            *(f"{float(row['times_first']):.2f}", f"{float(row['peak_memory_mib']):.0f}", f"{float(row['memory_over_first_mib']):+.0f}"),
            row["device"],
        )
        for row in rows
    ]
    return table(titles, cells) if cells else NOT_MEASURED


def end_to_end_table(rows: Iterable[dict[str, str]]) -> str:
    """One row for each contender."""
    titles = (
        *("recipe", "batch", "precision", "contender", "s/iteration", *(f"× {peer}" for peer in SPEEDUPS)),
        *("peak MiB", "student's", "device"),
    )
    cells = [
        (
            *(f"`{row['recipe']}`", row["batch_size"], row["precision"], row["contender"]),
            f"{float(row['seconds_per_iteration']):.3f}",
            *(f"{float(row[column]):.2f}" if row.get(column) else "" for column in SPEEDUPS.values()),
            row["peak_memory_mib"].partition(".")[0],
            *(row["imitation_memory_mib"].partition(".")[0], row["device"]),
        )
        for row in rows
    ]
    return table(titles, cells) if cells else NOT_MEASURED


def evaluation_table(rows: Iterable[dict[str, str]]) -> str:
    """One row for each stage and loader."""
    titles = ("stage", "loader", "workers", "images/s", "× torchvision", "device")
    cells = [
        (
            *(row["stage"], row["loader"], row["workers"], row["images_per_second"]),
            f"{float(row['times_torchvision']):.2f} ({float(row['lower']):.2f} to {float(row['upper']):.2f})",
            row["device"],
        )
        for row in rows
    ]
    return table(titles, cells) if cells else NOT_MEASURED


def kernel_table(rows: Iterable[dict[str, str]]) -> str:
    """Whole calls in float32 that differentiate every side, one row for each case: the peers, then numba."""
    titles = ("kernel", "size", "layout", "eager", "torch.compile", "best peer", "ours", "× eager", "× torch.compile", "device")
    cases: dict[tuple[str, str, str, str], dict[str, float]] = {}
    for row in rows:
        if row["mode"] in ("full", "update") and row["dtype"] == "float32" and row["variant"] != "student":
            kernel = row["kernel"] if row["variant"] in USUAL_VARIANTS else f"{row['kernel']} {row['variant']}"
            timed = cases.setdefault((kernel, row["size"], row["layout"], row["device"]), {})
            if row["median_us"]:
                timed[row["provider"]] = float(row["median_us"])
    cells = []
    for (kernel, size, layout, device), timed in cases.items():
        ours = min((name for name in timed if name in ("numba", "triton", "cuda")), key=timed.__getitem__)
        peers = [name for name in timed if name in ("averaged_model", "model_ema_v3", "foreach_lerp", "apex", "liger")]
        peer = min(peers, key=timed.__getitem__) if peers else None
        cells.append(
            (
                *(kernel, size, layout),
                *(f"{timed[name]:.0f}" if name in timed else "" for name in ("eager", "compile")),
                f"{peer} {timed[peer]:.0f}" if peer else "",
                f"{ours} {timed[ours]:.0f}",
                *(f"{timed[name] / timed[ours]:.2f}" if name in timed else "" for name in ("eager", "compile")),
                device,
            )
        )
    return table(titles, cells)
