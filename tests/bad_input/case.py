"""What a row of the table of bad inputs is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Case", "case"]

Content = str | bytes | Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """A command that must be refused in one line with exit code 2, and leave nothing behind."""

    name: str
    command: tuple[str, ...]
    error: str
    """What the line contains; the words that tell a user which field, file or value is wrong."""
    files: Mapping[str, Content] = field(default_factory=dict)
    """By path in the command's folder: its content, or what writes it there."""
    environment: Mapping[str, str] = field(default_factory=dict)
    own_process: bool = False
    """Whether the command runs in a process of its own, for what is read once a process; costs seconds."""


def case(
    name: str,
    *command: str,
    error: str,
    files: Mapping[str, Content] | None = None,
    environment: Mapping[str, str] | None = None,
    own_process: bool = False,
) -> Case:
    """A row: see :class:`Case`."""
    return Case(name, command, error, files or {}, environment or {}, own_process)
