"""Lines and tables on the terminal."""

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
"""Names up to this length are never wrapped."""
WIDEST = 1000


class Terminal(Console):
    """A console that reports a closed pipe, as of ``| head``; rich's own exits silently."""

    def on_broken_pipe(self) -> None:
        """Raise :class:`Interrupted` once, and print nothing from then on."""
        self.quiet = True
        discard(sys.stdout.fileno())
        raise Interrupted("the output was closed by its reader", signal.SIGPIPE)


def shell_quoted(path: Path) -> str:
    """Returns a path quoted for a shell; as ``$'…'`` of bash and zsh if it has unprintable characters."""
    text = str(path)
    if text.isprintable():
        return shlex.quote(text)
    escaped = (chr(byte) if 32 <= byte < 127 and chr(byte) not in "'\\" else f"\\x{byte:02x}" for byte in os.fsencode(path))
    return f"$'{''.join(escaped)}'"


def print_line(console: Console, text: str) -> None:
    """Print a line without markup, wrapped by the terminal instead of cropped."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_table(
    console: Console, header: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None, figures: bool = False
) -> None:
    """Print a table without markup. With ``figures``, cells behind the first column are right-aligned and never wrapped."""
    cells = list(rows)
    table = Table(title=title and Text(title), title_justify="left", box=None, pad_edge=False)
    for index, name in enumerate(header):
        whole = figures if index else all(len(row[0]) <= NAME for row in cells)
        table.add_column(Text(name), overflow="fold", no_wrap=whole, justify="right" if figures and index else "left")
    for row in cells:
        table.add_row(*map(Text, row))
    # A line that the terminal wraps is readable; a number that rich crops is lost.
    whole_width = console.measure(table, options=console.options.update(max_width=WIDEST)).maximum if figures else 0
    width, console.width = console.width, max(console.width, whole_width)
    console.print(table)
    console.width = width
