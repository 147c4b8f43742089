"""The logger ``dfkd_fast``, and how commands print its messages.

Warnings concern the results, info messages report progress, debug messages the parts of it.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from .choices import LogLevel
from .console import print_line

__all__ = ["LOGGER", "log_to_console"]

LOGGER = logging.getLogger("dfkd_fast")
LOGGER.addHandler(logging.NullHandler())  # the importing program decides what is printed


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        print_line(self.console, record.getMessage())


@contextmanager
def log_to_console(console: Console, level: LogLevel = "info") -> Iterator[None]:
    """Print messages of this level and above on a console, and nowhere else."""
    handler, before = _ConsoleHandler(console), (LOGGER.level, LOGGER.propagate)
    LOGGER.addHandler(handler)
    LOGGER.setLevel(level.upper())
    LOGGER.propagate = False
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(before[0])  # setLevel also clears the logger's cache of enabled levels
        LOGGER.propagate = before[1]
