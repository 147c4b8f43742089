"""Lines and short tables for the terminal."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["print_line", "print_table"]

NAME = 30
"""Characters of a name that is printed in one piece however narrow the terminal."""
WIDEST = 1000


def print_line(console: Console, text: str) -> None:
    """A line as it is, without markup, which the terminal wraps and nobody crops."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_table(
    console: Console, header: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None, figures: bool = False
) -> None:
    """A table whose cells are printed as they are, without markup; short names in front and ``figures`` behind are never broken."""
    cells = list(rows)
    table = Table(title=title and Text(title), title_justify="left", box=None, pad_edge=False)
    for index, name in enumerate(header):
        whole = figures if index else all(len(row[0]) <= NAME for row in cells)
        table.add_column(Text(name), overflow="fold", no_wrap=whole, justify="right" if figures and index else "left")
    for row in cells:
        table.add_row(*map(Text, row))
    # Figures that a narrow terminal crops are lost; a line that it wraps is not.
    whole_width = console.measure(table, options=console.options.update(max_width=WIDEST)).maximum if figures else 0
    width, console.width = console.width, max(console.width, whole_width)
    console.print(table)
    console.width = width
