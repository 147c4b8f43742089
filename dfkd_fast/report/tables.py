"""Short tables for the terminal."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["print_table"]


def print_table(
    console: Console, header: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None, figures: bool = False
) -> None:
    """A table whose cells are printed as they are, without markup; ``figures`` behind the first column are never broken."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for index, name in enumerate(header):
        whole = figures and index > 0
        table.add_column(name, overflow="fold", no_wrap=whole, justify="right" if whole else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
