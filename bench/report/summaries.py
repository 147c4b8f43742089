"""Results of GPUs that no CSV holds: files ``gpu-*.json``, one entry for each stage."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dfkd_fast.errors import DfkdError
from dfkd_fast.files import replacing

from ..gpu.records import FAILURES, Record
from ..gpu.stages import STAGES
from ..gpu.summary import NOT_CASES

__all__ = ["TABLES", "merged", "portable", "summarize", "write_summary"]

TABLES = ("micro", "end-to-end", "accuracy")
"""Tables whose rows have files of their own."""
CASES = 10  # named for each reason
KEPT = ("host", "ceilings", "kernels")
"""Tables of a stage that documents show: a value is kept until a newer one replaces it, as in TABLES."""


def summarize(device: str, records: Iterable[Record]) -> dict[str, Any]:
    """Summarize a device's records: what no CSV holds, without the cases that passed.

    Args:
        device: its name.
        records: its records, the last one of every case.

    Returns:
        ``device``, ``commit`` and ``stages``: by name, ``origin`` (commit, command, versions), ``status``, ``text`` and ``seconds`` of the
        whole stage, ``counts`` of its cases by status, ``reasons`` (``status``, ``text``, ``count`` and some of the ``cases`` of all that
        did not pass for the same reason), ``notes`` (highlighted texts, of a stage without rows), ``tables`` (rows of no
        other file, by the record's ``table``, each with its ``case`` and ``commit``) and ``origins`` (of these rows, by commit).
    """
    stages: dict[str, list[Record]] = {}
    commit = "unknown"
    for record in records:
        stages.setdefault(record.stage, []).append(record)
        commit = record.origin.get("commit") or commit
    return {"device": device, "commit": commit, "stages": _in_order({name: _stage(of_stage) for name, of_stage in stages.items()})}


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Merge two summaries of a device: stages of the new one replace those of the old one, unless they have no results."""
    stages = dict(old["stages"])
    for name, stage in new["stages"].items():
        if name not in stages:
            stages[name] = stage
        # A stage that had no time must not replace the results of an earlier call.
        elif stage["counts"] or stage["status"] != "left":
            stages[name] = _with_older_values(stage, stages[name])
    return {**new, "stages": _in_order(stages)}


def write_summary(path: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Replace the stages that ran again in a device's file; returns the summary of all stages.

    Raises:
        DfkdError: the file is another device's.
    """
    if path.exists():
        old = json.loads(path.read_text())
        if old["device"] != summary["device"]:
            raise DfkdError(f"{path.name}: has the results of {old['device']}, whose name is too much like {summary['device']}")
        summary = merged(old, summary)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        # One line per stage, so that a diff shows which stages ran again.
        stages = ",\n".join(f"{json.dumps(name)}: {json.dumps(stage, ensure_ascii=False)}" for name, stage in summary["stages"].items())
        head = f'"device": {json.dumps(summary["device"])}, "commit": {json.dumps(summary["commit"])}'
        part.write_text(f'{{{head}, "stages": {{\n{stages}\n}}}}\n', encoding="utf-8")
    return summary


def portable(line: str) -> str:
    """A command line without paths of the machine it ran on."""
    return re.sub(r"(--(?:out|data-root))[ =]\S+", r"\1 DIR", line)


def _stage(records: Sequence[Record]) -> dict[str, Any]:
    whole = next((record for record in records if not record.case), None)
    cases = [record for record in records if record.case]
    has_rows = any(record.table in TABLES for record in cases)
    alike: dict[tuple[str, str], list[str]] = {}
    tables: dict[str, list[dict[str, Any]]] = {}
    origins: dict[str, dict[str, Any]] = {}
    for record in cases:
        if record.status != "ok":
            alike.setdefault((record.status, record.text), []).append(record.case)
        if record.row and record.table not in TABLES:
            origin = _origin(record)
            origins[origin["commit"]] = origin
            tables.setdefault(record.table, []).append({**record.row, "case": record.case, "commit": origin["commit"]})
    return {
        "origin": _origin(whole or records[-1]),
        "status": whole.status if whole else "left",
        "text": whole.text if whole else "it did not come to its end",
        "seconds": whole.seconds if whole else None,
        "counts": dict(Counter(record.status for record in cases if record.table not in NOT_CASES or record.status in FAILURES)),
        "reasons": [
            {"status": status, "text": text, "count": len(named), "cases": named[:CASES]} for (status, text), named in alike.items()
        ],
        "notes": [] if has_rows else [record.text for record in cases if record.highlight and not record.table],
        "tables": tables,
        "origins": origins,
    }


def _origin(record: Record) -> dict[str, Any]:
    """Commit, command and versions."""
    origin = {name: value for name, value in record.origin.items() if name not in ("device", "rehearsal")}
    return {**origin, "commit": origin.get("commit") or "unknown", "command": portable(origin.get("command", ""))}


def _with_older_values(stage: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    tables = dict(stage["tables"])
    for name in KEPT:
        new = tables.get(name, [])
        replaced = {_identity(row) for row in new}
        rows = [*(row for row in old["tables"].get(name, ()) if _identity(row) not in replaced), *new]
        if rows:
            tables[name] = rows
    shown = {row["commit"] for rows in tables.values() for row in rows}
    origins = {commit: one for commit, one in (old["origins"] | stage["origins"]).items() if commit in shown}
    return {**stage, "tables": tables, "origins": origins}


def _in_order(stages: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    order = [stage.name for stage in STAGES]
    return dict(sorted(stages.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def _identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a newer row replaces: the same case; of a profile, all kernels of the same contender."""
    return tuple(row.get(name) for name in ("recipe", "batch_size", "contender")) if "contender" in row else (row["case"],)
