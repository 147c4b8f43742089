"""Files of rows in bench/results: CSV with a header, written whole."""

import csv
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dfkd_fast.files import replacing

__all__ = ["names", "read", "write"]


def names(row: type) -> tuple[str, ...]:
    """The columns of a dataclass of rows."""
    return tuple(field.name for field in dataclasses.fields(row))


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file, by column; an empty string is what was not measured."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Write rows; of older ones, columns that are no more are left out and new ones stay empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
