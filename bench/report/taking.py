"""Takes sources into bench/results: folders of runs, and what ``python -m bench gpu`` wrote."""

import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfkd_fast.errors import DfkdError, first_line
from dfkd_fast.files import replacing

from .. import end_to_end, provenance, table
from ..gpu.records import Record
from ..gpu.records import read as read_records
from ..gpu.stages import STAGES
from ..gpu.summary import latest
from ..micro import rows as micro_rows
from .figures import Figures, is_gpu
from .readme import command

__all__ = ["Intake", "summarize"]

RECORDS = "results.jsonl"
TABLES = ("micro", "end-to-end", "accuracy")
"""What records' rows are taken into files of their own."""
SHARED = ("device", "torch", "triton", "numba", "commit", "command")
"""What a row takes from its record's origin where it does not say it itself."""
CASES = 10  # named of all that have the same reason
RUN_FIELDS = ("recipe", "seed", "teacher_accuracy", "retention", "seconds")
RETENTION_FIELDS = ("last", "best", "largest_drop")
END_TO_END_FIELDS = ("recipe", "batch_size", "contender", "seconds_per_iteration")
END_TO_END_KEY = ("recipe", "batch_size", "precision", "contender")


@dataclass
class Intake:
    """What was read from the sources, checked and ready to be written."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    micro: dict[str, list[micro_rows.Row]] = field(default_factory=dict)
    """By device, as the next ones."""
    end_to_end: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    summaries: dict[str, dict[str, Any]] = field(default_factory=dict)

    def read(self, source: Path) -> None:
        """Add a source: the folder of a run, the ``--out`` folder of ``python -m bench gpu``, or its ``results.jsonl``.

        Raises:
            DfkdError: it is none of these, or holds nothing that may be published.
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
        """Replace what the files hold of the same cases and devices.

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
            micro_rows.write(results / f"micro-{provenance.file_name(device)}.csv", rows)
        for device, contenders in self.end_to_end.items():
            _write_end_to_end(results / f"end-to-end-{provenance.file_name(device)}.csv", contenders)
        for device, summary in self.summaries.items():
            _write_summary(results / f"gpu-{provenance.file_name(device)}.json", summary)
            counts = [(len(self.micro.get(device, ())), "kernel"), (len(self.end_to_end.get(device, ())), "end-to-end")]
            commits = sorted({stage["origin"]["commit"] for stage in summary["stages"].values()})
            figures = ", ".join(f"{count} {name} rows" for count, name in counts)
            lines.append(f"{device}: {figures}, stages {', '.join(summary['stages'])}, at {', '.join(commits)}")
        return lines

    def _read_records(self, path: Path) -> None:
        for device, records in _by_device(path).items():
            if not is_gpu(device):
                raise DfkdError(f"{path}: was measured on {device}, which is not a GPU")
            for record in records:
                try:
                    self._take_row(device, record)
                except (TypeError, ValueError) as error:
                    raise DfkdError(f"{path}: {record.stage} / {record.case}: {first_line(error)}") from error
            self.summaries[device] = _merged(self.summaries.get(device), summarize(device, records))

    def _take_row(self, device: str, record: Record) -> None:
        if not record.row or record.table not in TABLES:
            return
        row = {name: record.origin[name] for name in SHARED if record.origin.get(name)} | record.row
        row["command"] = _portable(row.get("command", ""))
        row.setdefault("commit", "unknown")
        if row["device"] != device and record.table != "accuracy":  # a run's device is "cuda"
            raise ValueError(f"a row of {row['device']} in a record of {device}")
        if record.table == "micro":
            known = {name: row[name] for name in micro_rows.COLUMNS if name in row}
            self.micro.setdefault(device, []).append(micro_rows.Row(**known))
        elif record.status != "ok":
            return  # a part of a run, or of a contender that failed, is not a figure
        elif record.table == "end-to-end":
            _require(row, END_TO_END_FIELDS)
            self.end_to_end.setdefault(device, []).append({name: _text(value) for name, value in row.items()})
        else:
            _require(row, RUN_FIELDS)
            _require(row["retention"], RETENTION_FIELDS)
            if row.setdefault("device_name", device) != device:
                raise ValueError(f"a run on {row['device_name']} in a record of {device}")
            self.runs.append(row)


def summarize(device: str, records: Iterable[Record]) -> dict[str, Any]:
    """What the tables of rows do not hold, without the thousands of cases that only passed.

    Args:
        device: its name.
        records: its records, the last one of every case.

    Returns:
        ``device``, and ``stages``: by name, ``origin`` (commit, command, versions), ``status``, ``text`` and ``seconds`` of the whole
        stage, ``counts`` of its cases by status, ``reasons`` (``status``, ``text``, ``count`` and some of the ``cases`` of all that did
        not pass for the same reason), ``notes`` (highlighted texts, of a stage without rows) and ``tables`` (rows that stand in no
        other file, by the record's ``table``, each with its ``case``).
    """
    stages: dict[str, list[Record]] = {}
    for record in records:
        stages.setdefault(record.stage, []).append(record)
    order = [stage.name for stage in STAGES]
    names = sorted(stages, key=lambda name: order.index(name) if name in order else len(order))
    return {"device": device, "stages": {name: _stage(stages[name]) for name in names}}


def _stage(records: Sequence[Record]) -> dict[str, Any]:
    whole = next((record for record in records if not record.case), None)
    cases = [record for record in records if record.case]
    has_rows = any(record.table in TABLES for record in cases)
    alike: dict[tuple[str, str], list[str]] = {}
    tables: dict[str, list[dict[str, Any]]] = {}
    for record in cases:
        if record.status != "ok":
            alike.setdefault((record.status, record.text), []).append(record.case)
        if record.row and record.table not in TABLES:
            tables.setdefault(record.table, []).append({"case": record.case, **record.row})
    origin = {name: value for name, value in (whole or records[-1]).origin.items() if name not in ("device", "rehearsal")}
    return {
        "origin": {"commit": "unknown", **origin, "command": _portable(origin.get("command", ""))},
        "status": whole.status if whole else "left",
        "text": whole.text if whole else "it did not come to its end",
        "seconds": whole.seconds if whole else None,
        "counts": dict(Counter(record.status for record in cases)),
        "reasons": [
            {"status": status, "text": text, "count": len(named), "cases": named[:CASES]} for (status, text), named in alike.items()
        ],
        "notes": [] if has_rows else [record.text for record in cases if record.highlight and not record.table],
        "tables": tables,
    }


def _by_device(path: Path) -> dict[str, list[Record]]:
    """The last record of every case, by the device it was recorded on."""
    try:
        records = read_records(path)
    except (TypeError, ValueError) as error:
        raise DfkdError(f"{path}: is not what python -m bench gpu writes ({first_line(error)[:120]})") from error
    if not records:
        raise DfkdError(f"{path}: has no records")
    if not all(isinstance(record.row, dict) and isinstance(record.origin, dict) for record in records):
        raise DfkdError(f"{path}: is not what python -m bench gpu writes (rows and origins are objects)")
    if any(record.origin.get("rehearsal") for record in records):
        raise DfkdError(f"{path}: is a rehearsal's: a CPU's figures are not a GPU's")
    if not all(record.origin.get("device") for record in records):
        raise DfkdError(f"{path}: has a record that does not say on which device it was measured")
    devices: dict[str, list[Record]] = {}
    for record in records:
        devices.setdefault(record.origin["device"], []).append(record)
    return {device: latest(of_device) for device, of_device in devices.items()}


def _run(folder: Path) -> dict[str, Any]:
    """A run's summary, with what was run and at which commit."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
        recipe = tomllib.loads((folder / "recipe.toml").read_text())
        root = " --data-root DIR" if recipe["data"]["root"] and recipe["data"]["name"] not in ("digits", "shapes") else ""
        line = f"dfkd-fast distill {summary['recipe']} --seed {summary['seed']}{root}"
        entry = {"command": line, "commit": provenance.commit(), **summary}
        _require(entry, RUN_FIELDS)
        _require(entry["retention"], RETENTION_FIELDS)
    except (KeyError, TypeError, ValueError) as error:
        raise DfkdError(f"{folder}: is not a run's folder: {first_line(error)}") from error
    return entry


def _write_runs(results: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Add runs to those of other recipes, seeds and devices."""

    def key(entry: dict[str, Any]) -> tuple[str, str, str, int]:
        return entry["recipe"], entry["device_name"], command(entry), entry["seed"]

    runs = {key(entry): entry for entry in [*Figures(results).runs, *entries]}
    results.mkdir(parents=True, exist_ok=True)
    with replacing(results / "distill.jsonl") as part:
        part.write_text("".join(json.dumps(runs[one]) + "\n" for one in sorted(runs)))


def _write_end_to_end(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Add contenders to the others of a device; columns that only a GPU has come last."""
    old = table.read(path) if path.exists() else []
    contenders = {tuple(row.get(name, "") for name in END_TO_END_KEY): row for row in [*old, *rows]}
    columns = dict.fromkeys([*table.names(end_to_end.Row), *(name for row in contenders.values() for name in row)])
    table.write(path, tuple(columns), contenders.values())


def _write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Replace the stages that ran again."""
    summary = _merged(json.loads(path.read_text()) if path.exists() else None, summary)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        # A stage a line: what ran again is what differs.
        stages = ",\n".join(f"{json.dumps(name)}: {json.dumps(stage, ensure_ascii=False)}" for name, stage in summary["stages"].items())
        part.write_text(f'{{"device": {json.dumps(summary["device"])}, "stages": {{\n{stages}\n}}}}\n')


def _merged(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    stages = (old or new)["stages"]
    # A stage for which there was no time must not take the place of what an earlier call found.
    return {**new, "stages": stages | {name: stage for name, stage in new["stages"].items() if stage["counts"] or name not in stages}}


def _portable(line: str) -> str:
    """A command line without the folders of the machine it ran on."""
    return re.sub(r"(--(?:out|data-root))[ =]\S+", r"\1 DIR", line)


def _require(row: dict[str, Any], names: Sequence[str]) -> None:
    missing = [name for name in names if row.get(name) is None]
    if missing:
        raise ValueError(f"has no {', '.join(missing)}")


def _text(value: object) -> str:
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
