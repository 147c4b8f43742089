"""Time and peak memory by phase of a run."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["Clock", "peak_memory_bytes"]


class Clock:
    """Measures seconds and, on a GPU, peak memory by phase.

    On a GPU, phases are timed with CUDA events and do not synchronize the device.

    Args:
        device: Device of the run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.peak_bytes: dict[str, int] = {}
        """Peak memory allocated by PyTorch in each phase, in bytes. Replays of a captured graph count in the phase of its capture."""
        self._previous_peak = 0
        self.seconds: dict[str, float] = defaultdict(float)
        """Duration of each phase in seconds, without pending CUDA events; see :meth:`read`."""
        self.pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str, *, memory: bool = True) -> Iterator[None]:
        """Context manager that adds the time spent in it to a phase.

        Args:
            name: Name of the phase.
            memory: Whether to measure peak memory, which is always measured the first time. It costs as much host time as launching
                dozens of kernels.
        """
        if self.on_gpu:
            memory = memory or name not in self.peak_bytes
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if memory:
                self._previous_peak = self.overall_peak_bytes()
                torch.cuda.reset_peak_memory_stats(self.device)
            start.record(torch.cuda.current_stream(self.device))
            yield
            end.record(torch.cuda.current_stream(self.device))
            self.pending.append((name, start, end))
            if memory:
                self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), torch.cuda.max_memory_allocated(self.device))
        else:
            start_time = time.perf_counter()
            yield
            self.seconds[name] += time.perf_counter() - start_time

    def overall_peak_bytes(self) -> int:
        """Returns the peak memory of the run in bytes, inside and outside of phases; see :func:`peak_memory_bytes`."""
        return max(self._previous_peak, peak_memory_bytes(self.device))

    def read(self) -> dict[str, float]:
        """Returns the duration of each phase so far in seconds, by name. Synchronizes the GPU."""
        if self.pending:
            torch.cuda.synchronize(self.device)
        for name, start, end in self.pending:
            self.seconds[name] += start.elapsed_time(end) / 1000
        self.pending.clear()
        return dict(self.seconds)


def peak_memory_bytes(device: torch.device) -> int:
    """Returns peak memory in bytes: on a GPU, allocated by PyTorch since the last reset; on a CPU, resident in the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage: a process inherits the peak of its parent.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
