"""The README's tables of runs and of kernels, from the files in bench/results.

python -m bench report                write the tables anew
python -m bench report RUN [RUN ...]  first take in the summaries of these folders, run at the commit checked out
"""

import csv
import json
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .provenance import ROOT, commit

__all__ = ["kernel_table", "main", "table"]

RESULTS = ROOT / "bench" / "results" / "distill.jsonl"
README = ROOT / "README.md"
BEGIN, END = "<!-- made by python -m bench.report from bench/results/distill.jsonl -->", "<!-- end of the table -->"
KERNELS_BEGIN = "<!-- made by python -m bench.report from bench/results/micro-*.csv -->"


def main(folders: Iterable[Path]) -> None:
    """Take in the runs in these folders and write the README's tables."""
    for folder in folders:
        take_in(folder)
    for begin, text in ((BEGIN, table(results())), (KERNELS_BEGIN, kernel_table(kernel_results()))):
        before, _, rest = README.read_text().partition(begin)
        README.write_text(f"{before}{begin}\n{text}\n{END}{rest.partition(END)[2]}")


def take_in(folder: Path) -> None:
    """Append a run's summary, with what was run and at which commit; it replaces one of the same recipe, seed and device."""
    summary = json.loads((folder / "summary.json").read_text())
    recipe = tomllib.loads((folder / "recipe.toml").read_text())
    root = " --data-root DIR" if recipe["data"]["root"] else ""
    entry = {"command": f"dfkd-fast distill {summary['recipe']} --seed {summary['seed']}{root}", "commit": commit(), **summary}
    kept = [old for old in results() if key(old) != key(entry)]
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in sorted([*kept, entry], key=key)))


def results() -> list[dict[str, Any]]:
    """What was measured so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def key(entry: dict[str, Any]) -> tuple[str, str, int]:
    """What makes a run another run."""
    return entry["recipe"], entry["device_name"], entry["seed"]


def table(entries: list[dict[str, Any]]) -> str:
    """A table in Markdown, a row a run."""
    rows = ["| command | teacher | student, last | best | mean | variance | seconds | device |", "|---|---|---|---|---|---|---|---|"]
    for entry in entries:
        student = entry["student_accuracy"]
        figures = [entry["teacher_accuracy"], *(student[name] for name in ("last", "best", "mean", "variance"))]
        cells = [
            f"`{entry['command']}`",
            *(f"{figure:.2f}" for figure in figures),
            f"{entry['seconds']['total']:.0f}",
            entry["device_name"],
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def kernel_results() -> list[dict[str, str]]:
    """The rows of the micro-benchmarks."""
    return [row for path in sorted(RESULTS.parent.glob("micro-*.csv")) for row in csv.DictReader(path.open(newline=""))]


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
