"""What is told beside results: the logger ``dfkd_fast``, and how commands show what it is given.

Warnings are what a reader of the figures must know, information is how far a command is, debug messages are the parts of that.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from .choices import LogLevel
from .console import print_line

__all__ = ["LOGGER", "log_to_console"]

LOGGER = logging.getLogger("dfkd_fast")
LOGGER.addHandler(logging.NullHandler())  # whoever imports this package decides what is short_repr


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        print_line(self.console, record.getMessage())


@contextmanager
def log_to_console(console: Console, level: LogLevel = "info") -> Iterator[None]:
    """Inside, messages of this level and above are lines on a console, and go nowhere else."""
    handler, before = _ConsoleHandler(console), (LOGGER.level, LOGGER.propagate)
    LOGGER.addHandler(handler)
    LOGGER.setLevel(level.upper())
    LOGGER.propagate = False
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(before[0])  # not by assignment: it forgets what was enabled
        LOGGER.propagate = before[1]
