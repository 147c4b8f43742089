"""The README's tables of runs and of kernels, from the files in bench/results.

python -m bench report                write the tables anew
python -m bench report RUN [RUN ...]  first take in the summaries of these folders, run at the commit checked out
"""

import json
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from dfkd_fast.errors import DfkdError

from . import table as table_files
from .provenance import ROOT, commit

__all__ = ["end_to_end_table", "evaluation_table", "kernel_table", "main", "methods_table", "segmentation_table", "table", "tables"]

RESULTS = ROOT / "bench" / "results" / "distill.jsonl"
README = ROOT / "README.md"
BEGIN, END = "<!-- made by python -m bench.report from bench/results/distill.jsonl -->", "<!-- end of the table -->"
SEGMENTATION_BEGIN = "<!-- made by python -m bench.report from the segmenters in bench/results/distill.jsonl -->"
NOT_MEASURED = "Not measured yet."
METHODS_BEGIN = "<!-- made by python -m bench.report from bench/results/methods-*.csv -->"
END_TO_END_BEGIN = "<!-- made by python -m bench.report from bench/results/end-to-end-*.csv -->"
EVALUATION_BEGIN = "<!-- made by python -m bench.report from bench/results/evaluation-*.csv -->"
KERNELS_BEGIN = "<!-- made by python -m bench.report from bench/results/micro-*.csv -->"


def main(folders: Iterable[Path]) -> None:
    """Take in the runs in these folders and write the README's tables."""
    made_at = commit()  # once: what is taken in makes the checkout differ from it
    for folder in folders:
        take_in(folder, made_at)
    for begin, text in tables().items():
        before, found, rest = README.read_text().partition(begin)
        if not found:
            raise DfkdError(f"{README}: has no line {begin!r} for its table to stand under")
        README.write_text(f"{before}{begin}\n{text}\n{END}{rest.partition(END)[2]}")


def tables() -> dict[str, str]:
    """Every table by the line it stands under in the README."""
    return {
        BEGIN: table([entry for entry in results() if not _segments(entry)]),
        SEGMENTATION_BEGIN: segmentation_table([entry for entry in results() if _segments(entry)]),
        METHODS_BEGIN: methods_table(methods_results()),
        END_TO_END_BEGIN: end_to_end_table(end_to_end_results()),
        EVALUATION_BEGIN: evaluation_table(evaluation_results()),
        KERNELS_BEGIN: kernel_table(kernel_results()),
    }


def take_in(folder: Path, made_at: str) -> None:
    """Append a run's summary, with what was run and at which commit; it replaces one of the same recipe, seed and device."""
    summary = json.loads((folder / "summary.json").read_text())
    recipe = tomllib.loads((folder / "recipe.toml").read_text())
    root = " --data-root DIR" if recipe["data"]["root"] and recipe["data"]["name"] not in ("digits", "shapes") else ""
    entry = {"command": f"dfkd-fast distill {summary['recipe']} --seed {summary['seed']}{root}", "commit": made_at, **summary}
    kept = [old for old in results() if key(old) != key(entry)]
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in sorted([*kept, entry], key=key)))


def results() -> list[dict[str, Any]]:
    """What was measured so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def key(entry: dict[str, Any]) -> tuple[str, str, int]:
    """What makes a run another run."""
    return entry["recipe"], entry["device_name"], entry["seed"]


def table(entries: list[dict[str, Any]]) -> str:
    """A table in Markdown, a row a recipe and device: means over its seeds, and what may hide behind a mean seed by seed."""
    titles = ("command", "seeds", "teacher", "last", "best", "mean", "variance", "variance, last ¾", "largest drop", "seconds", "device")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for alike in _grouped(entries):
        found = [entry["retention"] for entry in alike]
        cells = [
            _command(alike[0]),
            ", ".join(str(entry["seed"]) for entry in alike),
            _each([entry["teacher_accuracy"] for entry in alike]),
            _each([one["last"] for one in found]),
            *(f"{fmean(one[name] for one in found):.2f}" for name in ("best", "mean", "variance")),
            _each([one["settled_variance"] for one in found]),
            _each([one["largest_drop"] for one in found]),
            f"{fmean(entry['seconds']['total'] for entry in alike):.0f}",
            alike[0]["device_name"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def segmentation_table(entries: list[dict[str, Any]]) -> str:
    """A row a recipe and device of runs with a label a pixel: means over the seeds."""
    if not entries:
        return NOT_MEASURED
    titles = (
        "command",
        "seeds",
        "teacher",
        "last",
        "best",
        "last of the teacher's",
        "largest drop",
        "seconds, teacher's",
        "student's",
        "device",
    )
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for alike in _grouped(entries):
        shares = [entry["retention"]["last"] / entry["teacher_accuracy"] for entry in alike]
        cells = [
            _command(alike[0]),
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
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _segments(entry: dict[str, Any]) -> bool:
    return entry.get("metric") == "mIoU"


def _command(entry: dict[str, Any]) -> str:
    return f"`{entry['command'].replace(' --seed ' + str(entry['seed']), ' --seed N')}`"


def _grouped(entries: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault((entry["recipe"], entry["device_name"]), []).append(entry)
    return list(groups.values())


def _each(values: list[float]) -> str:
    """The mean, and in brackets every seed's."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"**{fmean(values):.2f}** ({', '.join(f'{value:.2f}' for value in values)})"


def methods_results() -> list[dict[str, str]]:
    """What the methods cost, of all devices."""
    return [row for path in sorted(RESULTS.parent.glob("methods-*.csv")) for row in table_files.read(path)]


def methods_table(rows: list[dict[str, str]]) -> str:
    """Time and memory of an iteration, beside those of the first recipe."""
    if not rows:
        return NOT_MEASURED
    titles = ("recipe", "fresh + replayed", "ms an iteration", "× the first", "peak MiB", "over the first", "device")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [
            *(f"`{row['recipe']}`", f"{row['fresh_rows']} + {row['replayed_rows']}", f"{float(row['iteration_ms']):.1f}"),
            *(f"{float(row['times_first']):.2f}", f"{float(row['peak_memory_mib']):.0f}", f"{float(row['memory_over_first_mib']):+.0f}"),
            row["device"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def end_to_end_results() -> list[dict[str, str]]:
    """Whole iterations, of all devices."""
    return [row for path in sorted(RESULTS.parent.glob("end-to-end-*.csv")) for row in table_files.read(path)]


def end_to_end_table(rows: list[dict[str, str]]) -> str:
    """A row a contender."""
    if not rows:
        return NOT_MEASURED
    titles = (
        "recipe",
        "batch",
        "precision",
        "contender",
        "s an iteration",
        "× plain",
        "× plain compiled",
        "peak MiB",
        "student's",
        "device",
    )
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [
            *(f"`{row['recipe']}`", row["batch_size"], row["precision"], row["contender"].replace("_", " ")),
            f"{float(row['seconds_per_iteration']):.3f}",
            *(f"{float(row[f'speedup_over_{peer}']):.2f}" if row[f"speedup_over_{peer}"] else "" for peer in ("plain", "plain_compiled")),
            row["peak_memory_mib"].partition(".")[0],
            *(row["imitation_memory_mib"].partition(".")[0], row["device"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def evaluation_results() -> list[dict[str, str]]:
    """The loaders of image files, of all devices."""
    return [row for path in sorted(RESULTS.parent.glob("evaluation-*.csv")) for row in table_files.read(path)]


def evaluation_table(rows: list[dict[str, str]]) -> str:
    """A row a stage and loader."""
    if not rows:
        return NOT_MEASURED
    titles = ("stage", "loader", "workers", "images/s", "× torchvision", "device")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        speed = f"{float(row['times_torchvision']):.2f} ({float(row['lower']):.2f} to {float(row['upper']):.2f})"
        lines.append(f"| {' | '.join((row['stage'], row['loader'], row['workers'], row['images_per_second'], speed, row['device']))} |")
    return "\n".join(lines)


def kernel_results() -> list[dict[str, str]]:
    """The rows of the micro-benchmarks."""
    return [row for path in sorted(RESULTS.parent.glob("micro-*.csv")) for row in table_files.read(path)]


def kernel_table(rows: list[dict[str, str]]) -> str:
    """Whole calls in float32 that differentiate every side, a row a case: the peers, then the fastest of our backends."""
    titles = ("kernel", "size", "layout", "eager", "torch.compile", "best peer", "ours", "× eager", "× torch.compile", "device")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    cases: dict[tuple[str, str, str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        if row["mode"] in ("full", "update") and row["dtype"] == "float32" and row["variant"] != "student":
            usual = row["variant"] in ("", "both", "plain")
            kernel = row["kernel"] if usual else f"{row['kernel']} {row['variant']}"
            cases.setdefault((kernel, row["size"], row["layout"], row["device"]), {})[row["provider"]] = row
    for (kernel, size, layout, device), found in cases.items():
        timed = {provider: float(row["median_us"]) for provider, row in found.items() if row["median_us"]}
        ours = min((name for name in timed if name in ("numba", "triton", "cuda")), key=timed.__getitem__)
        peers = [name for name in timed if name in ("averaged_model", "model_ema_v3", "foreach_lerp", "apex", "liger")]
        peer = min(peers, key=timed.__getitem__) if peers else None
        cells = [
            *(kernel, size, layout),
            *(f"{timed[name]:.0f}" if name in timed else "" for name in ("eager", "compile")),
            f"{peer} {timed[peer]:.0f}" if peer else "",
            f"{ours} {timed[ours]:.0f}",
            *(f"{timed[name] / timed[ours]:.2f}" if name in timed else "" for name in ("eager", "compile")),
            device,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(map(Path, sys.argv[1:]))
