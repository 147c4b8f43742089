"""Devices, optional packages and kernel backends of this machine."""

import importlib.util
import os
import platform
from importlib import metadata
from typing import NamedTuple

import torch

from .kernels import dispatch

__all__ = ["Choice", "Finding", "choices", "findings"]


class Finding(NamedTuple):
    """A device or an optional package."""

    name: str
    installed: str
    used: str
    """What does its work on this machine."""


class Choice(NamedTuple):
    """Backends of an operation of ``dfkd_fast.kernels``."""

    operation: str
    cpu: str
    gpu: str


def findings() -> list[Finding]:
    """Returns the devices and optional packages of this machine; imports nothing that could fail."""
    threads = f"{torch.get_num_threads()} threads"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return [
        Finding("Python", platform.python_version(), f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"),
        Finding("PyTorch", str(torch.__version__), f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"),
        Finding("GPU", gpu or "none", "cuda" if gpu else f"cpu, {threads}"),
        Finding("numba", _version("numba"), _use("numba", "the kernels on a CPU")),
        Finding("Triton", _version("triton"), _use("triton", "the kernels on a GPU" if gpu else "nothing: it needs a GPU")),
        Finding(
            "compiled extension",
            dispatch.unavailable_reason("cuda") or "built",
            _use("cuda", "the kernels on a GPU" if gpu else "nothing: it needs a GPU"),
        ),
        Finding("DALI", dali := _version("nvidia-dali-cuda130", "nvidia-dali-cuda120"), "torchvision" if dali == "none" else "image files"),
        Finding("apex", _apex(), "torch.optim"),
    ]


def choices() -> list[Choice]:
    """Returns the backend of every operation by device, on a CPU with the size from which it is used instead of the reference.

    Raises:
        BackendError: ``DFKD_FAST_BACKEND`` names a backend that does not exist or is not installed.
    """
    name = dispatch.forced()
    rows = []
    for operation, elements in dispatch.MIN_NUMEL.items():
        cpu, gpu = (_serving(operation, torch.device(kind)) for kind in ("cpu", "cuda"))
        small = "" if name or cpu == "reference" else f", from {elements} elements"
        absent = "" if name or torch.cuda.is_available() else ", if there is one"
        rows.append(Choice(operation, f"{cpu}{small}", f"{gpu}{absent}"))
    return rows


def _serving(operation: str, device: torch.device) -> str:
    """Returns the backend that an operation uses for large inputs on a device."""
    name, serving = dispatch.forced(), dispatch.backends(device)
    if operation in dispatch.PARTIALLY_SUPPORTED:  # PyTorch computes what numba does not support
        serving = [backend for backend in serving if dispatch.has_kernel(operation, backend)]
        if name == "numba" and name not in serving:
            return "reference"
    if name is None:
        return serving[0]
    return name if name in serving else "an error"


def _use(backend: dispatch.Backend, used: str) -> str:
    return "the kernels' PyTorch reference" if dispatch.unavailable_reason(backend) else used


def _version(*distributions: str) -> str:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "none"


def _apex() -> str:
    """Returns which apex is installed; NVIDIA's has a compiled module, PyPI's package of that name is a web toolkit."""
    if importlib.util.find_spec("amp_C") is not None:
        return "NVIDIA's, with its fused kernels"
    if importlib.util.find_spec("apex") is not None:
        return "not NVIDIA's (PyPI's apex is another project)"
    return "none"
