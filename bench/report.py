"""The README's table of runs, from the files in bench/results.

python -m bench report                write the table anew
python -m bench report RUN [RUN ...]  first take in the summaries of these folders, run at the commit checked out
"""

import json
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .provenance import ROOT, commit

__all__ = ["main", "table"]

RESULTS = ROOT / "bench" / "results" / "distill.jsonl"
README = ROOT / "README.md"
BEGIN, END = "<!-- made by python -m bench.report from bench/results/distill.jsonl -->", "<!-- end of the table -->"


def main(folders: Iterable[Path]) -> None:
    """Take in the runs in these folders and write the README's table."""
    for folder in folders:
        take_in(folder)
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{table(results())}\n{END}{rest.partition(END)[2]}")


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


if __name__ == "__main__":
    main(map(Path, sys.argv[1:]))
