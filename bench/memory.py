"""The most memory that steps need, beyond what is held before them."""

import ctypes
import gc
from pathlib import Path

import torch

__all__ = ["PeakMemory", "give_freed_memory_back"]

M_MMAP_THRESHOLD = -3  # of malloc.h


def give_freed_memory_back() -> None:
    """Tell glibc's malloc to give large blocks back to the system, so that what is resident is what is used."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)


class PeakMemory:
    """Measures from its making on. The process should do nothing else.

    On a GPU, what PyTorch's allocator reserves is compared with the tensors that are held. A replayed graph allocates nothing, so
    that the allocator's peak of allocated memory misses it; but the memory of its pool stays reserved, also when the cache is emptied.

    Args:
        device: where the steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self._held = torch.cuda.memory_allocated(device)
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # sets the process's peak to what it holds
            self._held = _resident("VmRSS")

    def mib(self) -> float:
        """The peak so far, in MiB, beyond what was held before."""
        return _mib(self._reserved() - self._held)

    def allocated_mib(self) -> float:
        """The peak so far of all tensors together; of the whole process on a CPU. It misses what replayed graphs work on."""
        return _mib(torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _resident("VmHWM"))

    def reserved_mib(self) -> float:
        """The peak so far of what PyTorch's allocator took from the GPU; of the whole process on a CPU."""
        return _mib(self._reserved())

    def _reserved(self) -> int:
        return torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else _resident("VmHWM")


def _mib(size: int) -> float:
    return round(size / 2**20, 1)


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])
