"""Lines and short tables for the terminal."""

import os
import shlex
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .interrupt import Interrupted, discard

__all__ = ["Terminal", "print_line", "print_table", "shell_quoted"]

NAME = 30
"""Characters of a name that is printed in one piece however narrow the terminal."""
WIDEST = 1000


class Terminal(Console):
    """A console that says so where nobody reads it any more, as behind ``| head``: rich's own ends the process without a word."""

    def on_broken_pipe(self) -> None:
        """Raise :class:`Interrupted`, once, and be silent from then on."""
        self.quiet = True
        discard(sys.stdout.fileno())
        raise Interrupted("nobody reads the output any more", signal.SIGPIPE)


def shell_quoted(path: Path) -> str:
    """A path as it is typed in a shell; with ``$'…'``, which bash and zsh know, where it has letters that cannot be printed."""
    text = str(path)
    if text.isprintable():
        return shlex.quote(text)
    escaped = (chr(byte) if 32 <= byte < 127 and chr(byte) not in "'\\" else f"\\x{byte:02x}" for byte in os.fsencode(path))
    return f"$'{''.join(escaped)}'"


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
