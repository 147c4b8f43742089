"""Checks environment variables that this package and its libraries read. Nothing here imports PyTorch."""

import os
import statistics
import sys
import time
from pathlib import Path

from .errors import DfkdError, short_repr

__all__ = ["check_environment", "set_wait_policy", "whole_number"]

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
WAIT_POLICY = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Variables with which users choose how OpenMP's threads wait."""
SAMPLES, INTERVAL = 5, 0.01
"""Number of times that running threads are counted, and seconds between."""
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


def set_wait_policy() -> bool:
    """Set ``OMP_WAIT_POLICY=passive`` if other programs use the cores, PyTorch is not yet imported and the user has not chosen a policy.

    By default GNU OpenMP's threads spin for milliseconds at every barrier, with PyTorch's threads and numba's alike. If there are more
    threads than cores, they spin on cores that the thread they wait for needs: two runs with two threads each on two cores took 50
    times as long as one. Passive threads sleep instead. That costs more on idle cores, where it is not set: small networks take half
    as long again.

    Returns:
        Whether the variable was set.
    """
    if "torch" in sys.modules or any(variable in os.environ for variable in WAIT_POLICY):
        return False
    cores, chosen = os.cpu_count() or 1, os.environ.get("OMP_NUM_THREADS", "")
    threads = int(chosen) if chosen.isdecimal() else cores
    if threads == 1 or running_threads() < max(cores / 4, cores - threads + 1):
        return False
    os.environ["OMP_WAIT_POLICY"] = "passive"
    return True


def running_threads(path: Path = Path("/proc/loadavg")) -> float:
    """Returns the number of running threads of other programs, the median over some hundredths of a second; 0 if the system is not Linux.

    Args:
        path: of the file that Linux reports them in, "0.20 0.18 0.12 running/existing 11206".
    """
    counts = []
    for sample in range(SAMPLES):
        time.sleep(INTERVAL if sample else 0)
        try:
            counts.append(int(path.read_text().split()[3].partition("/")[0]) - 1)  # without this one
        except (OSError, ValueError, IndexError):
            return 0
    return statistics.median(counts)
