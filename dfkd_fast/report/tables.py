"""Short tables for the terminal."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["print_table"]


def print_table(console: Console, header: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None) -> None:
    """A table whose cells are printed as they are, without markup."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
