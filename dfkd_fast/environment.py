"""Environment variables that this package and the libraries below it read as numbers. Nothing here imports PyTorch."""

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
"""The least and the largest value of each."""
LAYERS = ("default", "safe", "forksafe", "threadsafe", "tbb", "omp", "workqueue")
"""Of numba's threads."""
READ_BY_LIBRARIES = ("LOCAL_RANK", "NUMBA_NUM_THREADS", "NUMBA_DISABLE_JIT")


def whole_number(variable: str, default: int | None = None) -> int:
    """The value of a variable of ``BOUNDS``.

    Args:
        variable: its name.
        default: where it is not set; None where it must be.

    Raises:
        DfkdError: it is not set and must be, or is no whole number, or not one within its bounds.
    """
    text = os.environ.get(variable)
    if text is None and default is not None:
        return default
    if text is None:
        raise DfkdError(f"environment variable {variable} is not set: torchrun sets it")
    least, most = BOUNDS[variable]
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise DfkdError(f"environment variable {variable} = {short_repr(text)}: must be a whole number ≥ {least} and ≤ {most}")
    return number


def check_environment() -> None:
    """Find out whether libraries can be imported that read a variable as a number, and end or warn of it where it is none.

    What only this package reads is checked where it is read: of one process alone nothing but ``WORLD_SIZE`` counts.

    Raises:
        DfkdError: they cannot.
    """
    for variable in READ_BY_LIBRARIES:
        whole_number(variable, default=1)
    if (layer := os.environ.get("NUMBA_THREADING_LAYER", "default")) not in LAYERS:
        raise DfkdError(f"environment variable NUMBA_THREADING_LAYER = {short_repr(layer)}: must be one of {', '.join(LAYERS)}")
