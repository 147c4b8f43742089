"""Result of a ``dfkd-fast`` command that a test runs in its own process (the fixture ``run``)."""

from collections.abc import Callable
from typing import NamedTuple

__all__ = ["CommandResult", "Run"]


class CommandResult(NamedTuple):
    """One command's exit code and output."""

    code: int
    out: str
    err: str


Run = Callable[..., CommandResult]
