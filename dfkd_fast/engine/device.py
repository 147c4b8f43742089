"""The device a run is on, and how it is set up."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

import torch

from dfkd_fast.errors import DfkdError
from dfkd_fast.kernels import dispatch

__all__ = ["cudnn_benchmark", "device_name", "pick_device", "reuse_freed_memory"]

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def pick_device(name: Literal["auto", "cpu", "cuda"] | str) -> torch.device:
    """``auto`` is the GPU where PyTorch can use one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise DfkdError("device 'cuda': PyTorch sees no GPU here; use 'cpu', and see dfkd-fast doctor")
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


def reuse_freed_memory() -> None:
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
