"""A record: one line of what a stage checked or measured, and the file of them."""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

__all__ = ["FAILURES", "Record", "Status", "cases_done", "parse", "read", "stages_done"]

Status = Literal["ok", "wrong", "failed", "skipped", "left"]
"""A case passed; computed something else than its reference; raised an error; cannot run on this host; or there was no time for it."""
FAILURES: tuple[Status, ...] = ("failed", "wrong")


@dataclass(frozen=True)
class Record:
    """One case of a stage, or the stage itself."""

    stage: str
    case: str
    """Unique in its stage; empty for the stage as a whole, whose record comes last."""
    status: Status
    text: str = ""
    """One line: the reason, or the result."""
    detail: str = ""
    """More lines of a failure: a traceback, the end of a log."""
    seconds: float | None = None
    highlight: bool = False
    """Whether the text belongs in the final table even where nothing failed."""
    table: str = ""
    """What ``row`` is a row of: ``micro``, ``end-to-end``, ``accuracy`` or a name that only the stage's documents know."""
    row: dict[str, Any] = field(default_factory=dict)
    """Figures, by name."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Device, versions, commit and command; ``rehearsal`` is true where a CPU played the GPU."""

    def line(self) -> str:
        """The record as one line of JSON, without a newline."""
        return json.dumps({name: value for name, value in dataclasses.asdict(self).items() if value not in ("", None, {}, False)})


def parse(line: str) -> Record:
    """The record that :meth:`Record.line` wrote.

    Raises:
        ValueError: the line is something else.
    """
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise ValueError(f"{line[:80]!r} is not a record")
    names = {one.name for one in dataclasses.fields(Record)}
    record = Record(**{"case": "", **{name: value for name, value in fields.items() if name in names}})
    if record.status not in get_args(Status):
        raise ValueError(f"{record.status!r} is not a status")
    return record


def read(path: Path) -> list[Record]:
    """The records of a file; lines that were cut off, as by the end of a process or a full disk, are left out. No file, no records.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.is_file():
        return []
    lines = [line for line in path.read_text().split("\n") if line]
    records = []
    for line in lines:
        try:
            records.append(parse(line))
        except json.JSONDecodeError:
            continue
    if lines and not records:
        raise ValueError(f"{lines[0][:80]!r} is not a record")
    return records


def cases_done(records: Iterable[Record], stage: str) -> set[str]:
    """The cases of a stage whose last record is final: neither failed nor left for later."""
    last = {record.case: record.status for record in records if record.stage == stage and record.case}
    return {case for case, status in last.items() if status in ("ok", "skipped")}


def stages_done(records: Iterable[Record]) -> set[str]:
    """The stages that came to their end: their failed cases would fail again on the same commit and device."""
    last = {record.stage: record for record in records if not record.case}
    return {stage for stage, record in last.items() if record.row.get("complete")}
