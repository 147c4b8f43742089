"""What ``dfkd-fast`` said, where a test runs it in its own process (the fixture ``run``)."""

from collections.abc import Callable
from typing import NamedTuple

__all__ = ["Run", "Said"]


class Said(NamedTuple):
    """One command's exit code and output."""

    code: int
    out: str
    err: str


Run = Callable[..., Said]
