"""Errors whose message is one line for a user: the field or file, what it is, and what is allowed."""

import difflib
import errno
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path

USER_CODE_ERRORS = (Exception, SystemExit)
"""What a user's code may raise where it is called; an exit of its own must not end a command as if that had succeeded."""

LONGEST = 200
"""Characters of a value in an error."""


class DfkdError(ValueError):
    """Something a user can fix. The command line prints its message and exits with code 2."""


class NonFiniteLossError(DfkdError):
    """A loss became NaN or infinite; the message names the epoch, the iteration, the step and the term."""


class OutOfMemoryError(DfkdError):
    """A command needs more memory than there is; the message names what for, and the settings to lower."""


def first_line(error: BaseException) -> str:
    """An error's message cut to its first line, or its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def describe_os_error(error: OSError) -> str:
    """A system's error with what it is about: where it names no file it is of the output, as on a full disk that a log is on."""
    return f"the output: {error}" if error.errno == errno.ENOSPC and error.filename is None else str(error)


def describe_exception(error: BaseException) -> str:
    """What a user's code raised: its kind and its first line, and the last place of it that is no library's."""
    if isinstance(error, SystemExit):
        said = f"it exits, with the code {error.code!r}"
    else:
        said = ": ".join(dict.fromkeys((type(error).__name__, first_line(error))))
    libraries = (*map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")), str(Path(__file__).parent), "<")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(libraries) and not isinstance(error, SyntaxError):  # which says its place itself
            return f"{said} ({Path(frame.filename).name}, line {frame.lineno})"
    return said


def short_repr(value: object) -> str:
    """A value as an error shows it: its repr, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no integers of thousands of digits
        return f"a number of {int.bit_length(value)} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}…{text[-LONGEST // 4 :]}"


def unknown(what: str, name: str, known: Iterable[str]) -> DfkdError:
    """The error for a name that does not exist: suggests the nearest one, then lists what there is."""
    choices = sorted(set(known))
    nearest = difflib.get_close_matches(name, choices, n=1, cutoff=0.5) or [choice for choice in choices if choice.startswith(name)]
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return DfkdError(f"unknown {what} {short_repr(name)}: {hint}there are {', '.join(choices)}")
