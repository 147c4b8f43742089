"""The device a run is on, and what it costs there."""

import ctypes
import platform
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import torch

from dfkd_fast.errors import DfkdError
from dfkd_fast.kernels import dispatch

__all__ = ["Clock", "cudnn_benchmark", "device_name", "keep_freed_memory", "peak_memory_bytes", "pick_device"]

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def pick_device(name: Literal["auto", "cpu", "cuda"] | str) -> torch.device:
    """``auto`` is the GPU where PyTorch can use one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise DfkdError("device 'cuda': PyTorch sees no GPU here; use --device cpu, and see dfkd-fast doctor")
    if name not in ("cpu", "cuda"):
        raise DfkdError(f"device {name!r}: must be auto, cpu or cuda")
    device = torch.device(name)
    if (backend := dispatch.forced()) and backend not in dispatch.backends(device):
        raise DfkdError(f"device {name!r}: the kernels' backend {backend} is forced, and does not serve it")
    return device


def device_name(device: torch.device) -> str:
    """What figures are published with: the GPU, or the processor's vector instructions and the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held: by PyTorch's allocator since its peak was last reset on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage's: a process begins with the peak of the one that started it.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def keep_freed_memory() -> None:
    """Tell glibc's malloc to keep what is freed for the next request, from now on and in the whole process; elsewhere nothing.

    It would give blocks above 32 MiB back to the system, as tensors of a step are, and get them anew page by page, cleared.
    """
    with suppress(AttributeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def cudnn_benchmark(device: torch.device) -> Iterator[None]:
    """Inside, cuDNN tries its algorithms at the first convolution of a shape and keeps the fastest; for steps, whose shapes stay.

    Nothing changes where PyTorch or cuDNN was told to be deterministic: the fastest is not the same one in every run.
    """
    cudnn = torch.backends.cudnn
    if device.type != "cuda" or cudnn.deterministic or torch.are_deterministic_algorithms_enabled():
        yield
        return
    before, cudnn.benchmark = cudnn.benchmark, True
    try:
        yield
    finally:
        cudnn.benchmark = before


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
