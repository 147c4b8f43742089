"""Peak memory of steps, in addition to what was allocated before them."""

import ctypes
import gc
from pathlib import Path

import torch

__all__ = ["PeakMemory", "return_freed_memory"]

M_MMAP_THRESHOLD = -3  # of malloc.h


def return_freed_memory() -> None:
    """Make glibc's malloc return large freed blocks to the system, so that resident memory equals used memory."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)


class PeakMemory:
    """Peak memory since construction. Nothing else should run in the process.

    On a GPU this is the peak of the caching allocator's reserved memory, minus the tensors allocated at construction. A replayed CUDA graph
    allocates nothing, so that the peak of allocated memory omits it, but its memory pool stays reserved, even after ``empty_cache``.

    Args:
        device: device of the steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
            self._before = _resident("VmRSS")

    def mib(self) -> float:
        """Return the peak so far in MiB, in addition to what was allocated at construction."""
        return _mib(self._reserved() - self._before)

    def allocated_mib(self) -> float:
        """Return the peak so far of allocated memory in MiB; on a CPU of the whole process. It omits the pools of CUDA graphs."""
        return _mib(torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _resident("VmHWM"))

    def reserved_mib(self) -> float:
        """Return the peak so far of reserved memory in MiB; on a CPU of the whole process."""
        return _mib(self._reserved())

    def _reserved(self) -> int:
        return torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else _resident("VmHWM")


def _mib(size: int) -> float:
    return round(size / 2**20, 1)


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])
