"""The CSVs in bench/results.

A row is a dataclass whose fields are the columns. A field with ``columns`` in its metadata is a :class:`~bench.provenance.Provenance`, and
is replaced by these columns.
"""

import csv
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dfkd_fast.files import replacing

__all__ = ["cells", "header", "names", "read", "replace", "write", "write_anew"]


def names(row: type) -> tuple[str, ...]:
    """Return the columns of a dataclass of rows."""
    return tuple(name for field in dataclasses.fields(row) for name in field.metadata.get("columns", (field.name,)))


def cells(row: Any) -> dict[str, Any]:
    """Return a row as a dictionary by column, for CSV and JSON."""
    columns: dict[str, Any] = {}
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        columns |= value.columns(field.metadata["columns"]) if "columns" in field.metadata else {field.name: value}
    return columns


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV, by column; a value that was not measured is an empty string."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def header(path: Path) -> tuple[str, ...]:
    """Return the names in the first line of a CSV."""
    with path.open(newline="", errors="replace") as file:
        return tuple(next(csv.reader(file), ()))


def write(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Write a CSV. Columns that a row lacks stay empty; its other columns are dropped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_anew(path: Path, rows: Sequence[Any]) -> None:
    """Write a CSV of at least one row, replacing the whole file, because times of different runs are not comparable."""
    write(path, names(type(rows[0])), map(cells, rows))


def replace(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]], key: Sequence[str]) -> None:
    """Write rows to a CSV, replacing the rows with equal values in the columns ``key``; the other rows come first."""
    new = {tuple(str(row[name]) for name in key) for row in rows}
    kept = [row for row in read(path) if tuple(row[name] for name in key) not in new] if path.exists() else []
    write(path, columns, [*kept, *rows])
