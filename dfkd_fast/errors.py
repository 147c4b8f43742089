"""Errors whose message is one line: the field or file, its value, and what is allowed."""

import difflib
import errno
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

USER_CODE_ERRORS = (Exception, SystemExit)
"""Exceptions to catch around a user's code; its ``sys.exit`` must not end a command as if it had succeeded."""

LONGEST = 200
"""Characters of a value in an error message."""


class DfkdError(ValueError):
    """An error that the user can fix. The command line prints its message and exits with code 2."""


class NonFiniteLossError(DfkdError):
    """A loss became NaN or infinite; the message names the epoch, the iteration, the step and the term."""


class OutOfMemoryError(DfkdError):
    """Out of memory; the message says what the memory was for, and which settings to lower."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message, or its class name if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def describe_os_error(error: OSError) -> str:
    """Returns an OSError's message; a full disk without a file name is that of the standard output."""
    return f"the output: {error}" if error.errno == errno.ENOSPC and error.filename is None else str(error)


def describe_usage_error(error: Any) -> str:
    """Returns the message of a usage error of typer; if it is about a value, with the value, which pydantic's messages lack."""
    message, cause = error.format_message(), error.__cause__ or error.__context__
    values = [repr(detail["input"]) for detail in cause.errors()] if hasattr(cause, "errors") else []
    return f"{message}, not {values[0]}" if values and values[0] not in message else message


def describe_exception(error: BaseException) -> str:
    """Returns the class and message of an exception of a user's code, with the innermost line that is not in a library."""
    if isinstance(error, SystemExit):
        message = f"SystemExit with code {error.code!r}"
    else:
        message = ": ".join(dict.fromkeys((type(error).__name__, first_line(error))))
    libraries = (*map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")), str(Path(__file__).parent), "<")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(libraries) and not isinstance(error, SyntaxError):  # its message names the line
            return f"{message} ({Path(frame.filename).name}, line {frame.lineno})"
    return message


def short_repr(value: object) -> str:
    """Returns the repr of a value, shortened if it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of thousands of digits
        return f"a number of {int.bit_length(value)} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}…{text[-LONGEST // 4 :]}"


def unknown(what: str, name: str, known: Iterable[str]) -> DfkdError:
    """Returns the error for an unknown name, which suggests the nearest known one and lists all."""
    choices = sorted(set(known))
    nearest = difflib.get_close_matches(name, choices, n=1, cutoff=0.5) or [choice for choice in choices if choice.startswith(name)]
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return DfkdError(f"unknown {what} {short_repr(name)}: {hint}must be one of {', '.join(choices)}")
