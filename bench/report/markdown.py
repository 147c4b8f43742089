"""Tables in Markdown, and their places in a document."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from dfkd_fast.errors import DfkdError

__all__ = ["END", "Cell", "by_device", "code", "fill", "one_line", "table"]

END = "<!-- end of the table -->"
EMPTY = "–"


class Cell(NamedTuple):
    """What one device has in one row of a table."""

    labels: tuple[str, ...]
    """The row's first cells."""
    device: str
    text: str


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Titles and rows of as many cells, whatever the text in them."""

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(one_line(cell).replace('|', chr(92) + '|') for cell in cells)} |"

    return "\n".join([line(titles), "|---" * len(titles) + "|", *map(line, rows)])


def by_device(titles: Sequence[str], cells: Iterable[Cell]) -> str:
    """A table with a column for each device, in alphabetical order; rows in order of appearance.

    Args:
        titles: of the columns of labels.
        cells: at most one for each row and device.

    Raises:
        ValueError: a row has two cells of one device, which no table may mix.
    """
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for cell in cells:
        row = rows.setdefault(cell.labels, {})
        if cell.device in row:
            raise ValueError(f"{', '.join(cell.labels)}: two cells of {cell.device}")
        row[cell.device] = cell.text
    devices = sorted({device for row in rows.values() for device in row})
    return table([*titles, *devices], [[*labels, *(row.get(device, EMPTY) for device in devices)] for labels, row in rows.items()])


def one_line(text: str) -> str:
    """Text without line breaks, which would end a table, a heading or an item of a list."""
    return " ".join(text.split())


def code(text: str, width: int = 120) -> str:
    """One line in a code span, cut to a width."""
    line = one_line(text).replace("`", "'")
    return f"`{line if len(line) <= width else line[: width - 1] + '…'}`"


def fill(path: Path, sections: dict[str, str]) -> str:
    """A document with these tables in their places.

    Args:
        path: of the document.
        sections: the tables, by the line that each stands under; a line :data:`END` stands under the table.

    Returns:
        The new text; the file is not changed.

    Raises:
        DfkdError: one of these lines is missing.
    """
    text = path.read_text()
    for begin, section in sections.items():
        before, found, rest = text.partition(begin)
        _, ended, after = rest.partition(END)
        if not found or not ended:
            raise DfkdError(
                f"{path}: has no line {begin if not found else END!r} for its table to stand {'under' if not found else 'above'}"
            )
        # A name that looks like one of these lines must not be taken for it the next time.
        escaped = section.replace("<!--", "&lt;!--")
        text = f"{before}{begin}\n{escaped}\n{END}{after}"
    return text
