"""Checks environment variables that this package and its libraries read. Nothing here imports PyTorch."""

import os

from .errors import DfkdError, short_repr

__all__ = ["check_environment", "whole_number"]

BOUNDS = {
    "WORLD_SIZE": (1, 2**31 - 1),
    "RANK": (0, 2**31 - 1),
    "LOCAL_RANK": (0, 2**31 - 1),
    "MASTER_PORT": (1, 2**16 - 1),
    "TORCHELASTIC_RESTART_COUNT": (0, 2**31 - 1),
    "NUMBA_NUM_THREADS": (1, 2**15 - 1),
    "NUMBA_DISABLE_JIT": (0, 1),
}
"""Minimum and maximum of each variable."""
LAYERS = ("default", "safe", "forksafe", "threadsafe", "tbb", "omp", "workqueue")
"""Threading layers of numba."""
READ_BY_LIBRARIES = ("LOCAL_RANK", "NUMBA_NUM_THREADS", "NUMBA_DISABLE_JIT")


def whole_number(variable: str, default: int | None = None) -> int:
    """Returns the value of a variable of ``BOUNDS``.

    Args:
        variable: its name.
        default: value if it is not set; None if it must be set.

    Raises:
        DfkdError: it must be set and is not, or is not a whole number within its bounds.
    """
    text = os.environ.get(variable)
    if text is None and default is not None:
        return default
    if text is None:
        raise DfkdError(f"environment variable {variable} is not set: torchrun sets it")
    minimum, maximum = BOUNDS[variable]
    try:
        number = int(text)
    except ValueError:
        number = minimum - 1
    if not minimum <= number <= maximum:
        raise DfkdError(f"environment variable {variable} = {short_repr(text)}: must be a whole number ≥ {minimum} and ≤ {maximum}")
    return number


def check_environment() -> None:
    """Check variables that libraries read when they are imported; those of this package are checked where they are read.

    Raises:
        DfkdError: a variable has a value that its library does not accept.
    """
    for variable in READ_BY_LIBRARIES:
        whole_number(variable, default=1)
    if (layer := os.environ.get("NUMBA_THREADING_LAYER", "default")) not in LAYERS:
        raise DfkdError(f"environment variable NUMBA_THREADING_LAYER = {short_repr(layer)}: must be one of {', '.join(LAYERS)}")
