"""The tables of runs, whole iterations, loaders and kernels on a CPU."""

from collections.abc import Iterable
from statistics import fmean
from typing import Any

from ..end_to_end.rows import SPEEDUPS
from .markdown import code, marker, table
from .results import Results, is_gpu

__all__ = [
    "by_seed",
    "command",
    "duration",
    "end_to_end_table",
    "evaluation_table",
    "kernel_table",
    "mean_and_seeds",
    "methods_table",
    "run_table",
    "sections",
    "segmentation_table",
]

RUNS = marker("classification runs on CPUs", "bench/results/distill.jsonl")
SEGMENTATION = marker("segmentation runs on CPUs", "bench/results/distill.jsonl")
METHODS = marker("methods on CPUs", "bench/results/methods-*.csv")
END_TO_END = marker("iterations on CPUs", "bench/results/end-to-end-*.csv")
EVALUATION = marker("data loaders on CPUs", "bench/results/evaluation-*.csv")
KERNELS = marker("kernels on CPUs", "bench/results/micro-*.csv")
NOT_MEASURED = "Not measured yet."
USUAL_VARIANTS = ("", "both", "plain")  # of a kernel, which need not be named


def sections(results: Results) -> dict[str, str]:
    """Every table as Markdown, by its marker."""
    runs = [entry for entry in results.runs if not is_gpu(entry["device_name"])]
    return {
        RUNS: run_table([entry for entry in runs if not _segments(entry)]),
        SEGMENTATION: segmentation_table([entry for entry in runs if _segments(entry)]),
        METHODS: methods_table(results.rows("methods", "cpu")),
        END_TO_END: end_to_end_table(results.rows("end-to-end", "cpu")),
        EVALUATION: evaluation_table(results.rows("evaluation", "cpu")),
        KERNELS: kernel_table(results.rows("micro", "cpu")),
    }


def run_table(entries: list[dict[str, Any]]) -> str:
    """One row for each recipe and device: means over its seeds, and each seed where a mean may hide the spread."""
    titles = (
        *("recipe", "seeds", "teacher", "last epoch", "best epoch", "mean", "variance", "variance, last ¾"),
        *("largest drop", "time (s)", "device"),
    )
    rows = []
    for alike in by_seed(entries):
        retained = [entry["retention"] for entry in alike]
        cells = [
            code(alike[0]["recipe"]),
            ", ".join(str(entry["seed"]) for entry in alike),
            mean_and_seeds([entry["teacher_accuracy"] for entry in alike]),
            mean_and_seeds([one["last"] for one in retained]),
            *(f"{fmean(one[name] for one in retained):.2f}" for name in ("best", "mean", "variance")),
            mean_and_seeds([one["settled_variance"] for one in retained]),
            mean_and_seeds([one["largest_drop"] for one in retained]),
            f"{fmean(map(duration, alike)):.0f}",
            alike[0]["device_name"],
        ]
        rows.append(cells)
    return table(titles, rows)


def segmentation_table(entries: list[dict[str, Any]]) -> str:
    """One row for each recipe and device, of runs with per-pixel labels: means over the seeds."""
    if not entries:
        return NOT_MEASURED
    titles = (
        *("recipe", "seeds", "teacher mIoU", "last epoch", "best epoch", "last / teacher", "largest drop"),
        *("teacher (s)", "student (s)", "device"),
    )
    rows = []
    for alike in by_seed(entries):
        shares = [entry["retention"]["last"] / entry["teacher_accuracy"] for entry in alike]
        cells = [
            code(alike[0]["recipe"]),
            ", ".join(str(entry["seed"]) for entry in alike),
            mean_and_seeds([entry["teacher_accuracy"] for entry in alike]),
            mean_and_seeds([entry["retention"]["last"] for entry in alike]),
            mean_and_seeds([entry["retention"]["best"] for entry in alike]),
            f"{100 * fmean(shares):.1f} %",
            mean_and_seeds([entry["retention"]["largest_drop"] for entry in alike]),
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


def by_seed(entries: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Runs grouped by command and device: a group's runs differ in the seed only."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault((command(entry), entry["device_name"]), []).append(entry)
    return list(groups.values())


def duration(run: dict[str, Any]) -> float:
    """Seconds of a run with its teacher's training, which another command may have done before."""
    total = float(run["seconds"]["total"])
    return max(total, sum(seconds for phase, seconds in run["seconds"].items() if phase != "total"))


def mean_and_seeds(values: list[float]) -> str:
    """The mean, and in brackets the value of each seed."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"**{fmean(values):.2f}** ({', '.join(f'{value:.2f}' for value in values)})"


def methods_table(rows: Iterable[dict[str, str]]) -> str:
    """Time and peak memory of an iteration, relative to the first recipe."""
    titles = ("recipe", "fresh + replayed", "ms/iteration", "× first row", "peak memory (MiB)", "− first row (MiB)", "device")
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
        *("peak memory (MiB)", "student steps (MiB)", "first two (s)", "device"),
    )
    cells = [
        (
            *(f"`{row['recipe']}`", row["batch_size"], row["precision"], row["contender"]),
            f"{float(row['seconds_per_iteration']):.3f}",
            *(f"{float(row[column]):.2f}" if row.get(column) else "" for column in SPEEDUPS.values()),
            row["peak_memory_mib"].partition(".")[0],
            row["imitation_memory_mib"].partition(".")[0],
            f"{float(row['warm_up_seconds']):.1f}" if row.get("warm_up_seconds") else "",
            row["device"],
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
    """Forward and backward to every input in float32, one row for each case: the peers, then our fastest backend."""
    titles = (
        *("kernel", "size", "layout", "eager (µs)", "torch.compile (µs)", "fastest other peer (µs)", "ours (µs)"),
        *("× eager", "× torch.compile", "device"),
    )
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
