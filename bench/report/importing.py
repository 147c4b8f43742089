"""Import of sources into bench/results: run folders, and what ``python -m bench gpu`` wrote."""

import json
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfkd_fast.data import DATA_SETS
from dfkd_fast.errors import DfkdError, first_line
from dfkd_fast.files import replacing

from .. import end_to_end, provenance, table
from ..end_to_end.contenders import current_name
from ..gpu.records import Record
from ..gpu.records import read as read_records
from ..gpu.summary import latest
from ..micro import rows as micro_rows
from .checks import check_record, check_row, check_run
from .cpu import command
from .results import Results, is_gpu
from .summaries import TABLES, merged, portable, summarize, write_summary

__all__ = ["Importer"]

RECORDS = "results.jsonl"
SHARED = ("device", "torch", "triton", "numba", "commit", "command")
"""Columns that a row without them takes from its record's origin."""
END_TO_END_KEY = ("recipe", "batch_size", "precision", "contender")


@dataclass
class Importer:
    """The rows and runs read from the sources, validated and ready to be written."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    micro: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Rows by device, as the next ones."""
    end_to_end: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    summaries: dict[str, dict[str, Any]] = field(default_factory=dict)

    def read(self, source: Path) -> None:
        """Add a source: the folder of a run, the ``--out`` folder of ``python -m bench gpu``, or its ``results.jsonl``.

        Raises:
            DfkdError: it is not one of these, or holds something that may not be published.
        """
        if (source / RECORDS).is_file():
            self._read_records(source / RECORDS)
        elif source.is_file():
            self._read_records(source)
        elif (source / "summary.json").is_file():
            self.runs.append(_run(source))
        else:
            raise DfkdError(
                f"{source}: is neither a run's folder (with summary.json) nor the --out of python -m bench gpu (with {RECORDS})"
            )

    def write(self, results: Path) -> list[str]:
        """Replace the rows of the same cases and devices in the files.

        Args:
            results: the folder of the files.

        Returns:
            What was written, in lines.
        """
        lines = []
        if self.runs:
            _write_runs(results, self.runs)
            lines += [f"{entry['device_name']}: {entry['recipe']}, seed {entry['seed']}, at {entry['commit']}" for entry in self.runs]
        for device, rows in self.micro.items():
            _write_micro(results / f"micro-{provenance.file_name(device)}.csv", rows)
        for device, contenders in self.end_to_end.items():
            _write_end_to_end(results / f"end-to-end-{provenance.file_name(device)}.csv", contenders)
        for device, summary in self.summaries.items():
            stages = write_summary(results / f"gpu-{provenance.file_name(device)}.json", summary)["stages"]
            counts = [(len(self.micro.get(device, ())), "kernel"), (len(self.end_to_end.get(device, ())), "end-to-end")]
            counted = ", ".join(f"{count} {name} rows" for count, name in counts)
            ended = [
                f"{name} {stage['status']}"
                + ("" if stages[name]["origin"] == stage["origin"] else f" (results of {stages[name]['origin']['commit']} are kept)")
                for name, stage in summary["stages"].items()
            ]
            lines.append(f"{device}: {counted}, stages {', '.join(ended)}, at {summary['commit']}")
        return lines

    def _read_records(self, path: Path) -> None:
        for device, records in _by_device(path).items():
            if not is_gpu(device):
                raise DfkdError(f"{path}: was measured on {device}, which is not a GPU")
            if not provenance.file_name(device):
                raise DfkdError(f"{path}: was measured on {device!r}, which cannot be a part of a file's name")
            for record in records:
                self._take_row(path, device, record)
            summary = summarize(device, records)
            self.summaries[device] = merged(self.summaries[device], summary) if device in self.summaries else summary

    def _take_row(self, path: Path, device: str, record: Record) -> None:
        if not record.row:
            return
        if record.table not in TABLES:
            check_row(path, record, record.row)
            return
        if record.table != "micro" and record.status != "ok":
            return  # of an incomplete run, or of a contender that failed
        row: dict[str, Any] = {"commit": "unknown", "command": ""}
        row |= {name: record.origin[name] for name in SHARED if record.origin.get(name)} | record.row
        if record.table == "accuracy":
            row.setdefault("device_name", device)
        check_row(path, record, row)
        row["command"] = portable(row["command"])
        row_device = row["device_name" if record.table == "accuracy" else "device"]  # a run's device is "cuda"
        if row_device != device:
            raise DfkdError(f"{path}: {record.stage} / {record.case}: a row of {row_device} in a record of {device}")
        if record.table == "micro":
            self.micro.setdefault(device, []).append(row)
        elif record.table == "end-to-end":
            row["contender"] = current_name(row["contender"])
            self.end_to_end.setdefault(device, []).append({name: _text(value) for name, value in row.items()})
        else:
            self.runs.append(row)


def _by_device(path: Path) -> dict[str, list[Record]]:
    """The last record of every case, by the device it was recorded on."""
    try:
        records = read_records(path)
    except (RecursionError, TypeError, ValueError) as error:
        raise DfkdError(f"{path}: is not what python -m bench gpu writes ({first_line(error)[:120]})") from error
    if not records:
        raise DfkdError(f"{path}: has no records")
    for record in records:
        check_record(path, record)
    if any(record.origin.get("rehearsal") for record in records):
        raise DfkdError(f"{path}: is a rehearsal's: times of a CPU are not a GPU's")
    if not all(record.origin.get("device") for record in records):
        raise DfkdError(f"{path}: has a record that does not say on which device it was measured")
    devices: dict[str, list[Record]] = {}
    for record in records:
        devices.setdefault(record.origin["device"], []).append(record)
    return {device: latest(of_device) for device, of_device in devices.items()}


def _run(folder: Path) -> dict[str, Any]:
    """A run's summary, with its command and commit."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
        recipe = tomllib.loads((folder / "recipe.toml").read_text())
        root = " --data-root DIR" if recipe["data"]["root"] and DATA_SETS[recipe["data"]["name"]].needs_root else ""
        line = f"dfkd-fast distill {summary['recipe']} --seed {summary['seed']}{root}"
        entry = {"command": line, "commit": provenance.commit(), **summary}
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise DfkdError(f"{folder}: is not a run's folder: {first_line(error)}") from error
    check_run(folder, entry)
    return entry


def _write_runs(results: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Add runs to those of other recipes, seeds and devices."""

    def key(entry: dict[str, Any]) -> tuple[str, str, str, int]:
        return entry["recipe"], entry["device_name"], command(entry), entry["seed"]

    runs = {key(entry): entry for entry in [*Results(results).runs, *entries]}
    results.mkdir(parents=True, exist_ok=True)
    with replacing(results / "distill.jsonl") as part:
        part.write_text("".join(json.dumps(runs[one]) + "\n" for one in sorted(runs)))


def _write_end_to_end(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Merge contenders into a device's file; columns that only GPUs have come last."""
    old = table.read(path) if path.exists() else []
    contenders = {tuple(row.get(name, "") for name in END_TO_END_KEY): row for row in [*old, *rows]}
    columns = dict.fromkeys([*table.names(end_to_end.Row), *(name for row in contenders.values() for name in row)])
    table.write(path, tuple(columns), contenders.values())


def _write_micro(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to those of other cases; one without a time does not take the place of another commit's time."""
    timed = [row for row in table.read(path) if row["median_us"]] if path.exists() else []
    commits = {tuple(row[name] for name in micro_rows.KEY): row["commit"] for row in timed}

    def replaces(row: dict[str, Any]) -> bool:
        return row.get("median_us") is not None or commits.get(tuple(row[name] for name in micro_rows.KEY), row["commit"]) == row["commit"]

    micro_rows.write(path, [row for row in rows if replaces(row)])


def _text(value: object) -> str:
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
