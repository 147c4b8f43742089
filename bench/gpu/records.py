"""Records of checks and measurements, and the JSON Lines file of them."""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

__all__ = ["FAILURES", "Record", "Status", "cases_done", "parse", "read", "stages_done"]

Status = Literal["ok", "wrong", "failed", "skipped", "left"]
"""A case passed; differs from its reference; raised an error; cannot run on this host; or did not run for lack of time."""
FAILURES: tuple[Status, ...] = ("failed", "wrong")


@dataclass(frozen=True)
class Record:
    """Result of one case of a stage, or of the stage itself."""

    stage: str
    case: str
    """Name, unique in the stage; empty for the stage itself, whose record comes last."""
    status: Status
    text: str = ""
    """One line with the result, or with the reason of a failure."""
    detail: str = ""
    """Further lines of a failure, such as a traceback or the end of a log."""
    seconds: float | None = None
    highlight: bool = False
    """Whether the text is part of the final table even if nothing failed."""
    table: str = ""
    """Name of the table that ``row`` belongs to: ``micro``, ``end-to-end``, ``accuracy`` or another one."""
    row: dict[str, Any] = field(default_factory=dict)
    """Values by column."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Device, versions, commit and command; ``rehearsal`` is true if a CPU stood in for the GPU."""

    def line(self) -> str:
        """Return the record as one line of JSON, without a newline."""
        return json.dumps({name: value for name, value in dataclasses.asdict(self).items() if value not in ("", None, {}, False)})


def parse(line: str) -> Record:
    """Parse a line written by :meth:`Record.line`; returns the record.

    Raises:
        ValueError: The line is not a record.
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
    """Return the records of a file, without truncated lines, which a killed process or a full disk leaves. Empty if there is no file.

    Raises:
        ValueError: The file does not contain records.
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
    """Return the cases of a stage whose last record is neither a failure nor left for later."""
    last = {record.case: record.status for record in records if record.stage == stage and record.case}
    return {case for case, status in last.items() if status in ("ok", "skipped")}


def stages_done(records: Iterable[Record]) -> set[str]:
    """Return the completed stages. Their failed cases would fail again on the same commit and device."""
    last = {record.stage: record for record in records if not record.case}
    return {stage for stage, record in last.items() if record.row.get("complete")}
