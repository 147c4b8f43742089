"""Selection and configuration of the device of a run."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

import torch

from dfkd_fast.errors import DfkdError
from dfkd_fast.kernels import dispatch
from dfkd_fast.surgery.conv_selection import measuring

__all__ = ["benchmark_convolutions", "device_name", "pick_device", "reuse_freed_memory"]

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def pick_device(name: Literal["auto", "cpu", "cuda"] | str) -> torch.device:
    """Returns the device for a name. ``auto`` is the GPU if one is available, otherwise the CPU.

    Raises:
        DfkdError: The name is unknown, no GPU is available, or the forced kernel backend does not support the device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise DfkdError("device 'cuda': no GPU is available to PyTorch; use 'cpu', or run dfkd-fast doctor")
    if name not in ("cpu", "cuda"):
        raise DfkdError(f"device {name!r}: must be auto, cpu or cuda")
    device = torch.device(name)
    if (backend := dispatch.forced()) and backend not in dispatch.backends(device):
        raise DfkdError(f"device {name!r}: not supported by the forced kernel backend {backend!r}")
    return device


def device_name(device: torch.device) -> str:
    """Returns a description of the device for benchmark results: the GPU model, or the CPU's architecture, vector instruction set and
    number of threads.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def reuse_freed_memory() -> None:
    """Configures glibc's malloc to reuse freed memory for the rest of the process. Does nothing with other C libraries.

    By default glibc returns blocks above 32 MiB, such as the tensors of a step, to the operating system, which clears every page at
    the next allocation.
    """
    with suppress(AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def benchmark_convolutions(device: torch.device) -> Iterator[None]:
    """Context manager in which the algorithm of each convolution is selected by a measurement, for steps, whose shapes do not change.

    On a GPU it enables ``torch.backends.cudnn.benchmark``, on a CPU the measurements for :class:`~dfkd_fast.surgery.CpuConv2d`. It does
    nothing if deterministic algorithms are requested: the fastest algorithm may differ between runs.
    """
    cudnn = torch.backends.cudnn
    if torch.are_deterministic_algorithms_enabled() or (device.type == "cuda" and cudnn.deterministic):
        yield
        return
    if device.type != "cuda":
        with measuring():
            yield
        return
    previous, cudnn.benchmark = cudnn.benchmark, True
    try:
        yield
    finally:
        cudnn.benchmark = previous
