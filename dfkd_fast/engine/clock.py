"""What the phases of a run cost: seconds and peak memory."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["Clock", "peak_memory_bytes"]


class Clock:
    """Seconds and, on a GPU, peak memory by phase. There the phases are timed by events, so that the host never waits inside one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.peak_bytes: dict[str, int] = {}
        """Most memory that PyTorch's allocator held in each phase, as often as it was measured; the steps of a captured graph are in
        that of its capture."""
        self._peak_before = 0
        self.seconds: dict[str, float] = defaultdict(float)
        self.pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str, *, memory: bool = True) -> Iterator[None]:
        """Add the time spent inside to a phase.

        Args:
            name: of the phase.
            memory: whether to measure its peak memory again. The first of a name always does; asking costs the host as much as dozens
                of kernels.
        """
        if self.on_gpu:
            memory = memory or name not in self.peak_bytes
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if memory:
                self._peak_before = self.overall_peak_bytes()
                torch.cuda.reset_peak_memory_stats(self.device)
            start.record(torch.cuda.current_stream(self.device))
            yield
            end.record(torch.cuda.current_stream(self.device))
            self.pending.append((name, start, end))
            if memory:
                self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), torch.cuda.max_memory_allocated(self.device))
        else:
            begin = time.perf_counter()
            yield
            self.seconds[name] += time.perf_counter() - begin

    def overall_peak_bytes(self) -> int:
        """Most memory held so far, in measured phases, in others and between them; see :func:`peak_memory_bytes`."""
        return max(self._peak_before, peak_memory_bytes(self.device))

    def read(self) -> dict[str, float]:
        """The seconds of every phase so far; waits for the GPU."""
        if self.pending:
            torch.cuda.synchronize(self.device)
        for name, start, end in self.pending:
            self.seconds[name] += start.elapsed_time(end) / 1000
        self.pending.clear()
        return dict(self.seconds)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held: by PyTorch's allocator since its peak was last reset on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage's: a process begins with the peak of the one that started it.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
