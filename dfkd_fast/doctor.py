"""What this machine has, and what is used instead of what it lacks."""

import importlib.util
import os
import platform
from importlib import metadata
from typing import NamedTuple

import torch

__all__ = ["Finding", "examine"]

REFERENCE = "the kernels' PyTorch reference"


class Finding(NamedTuple):
    """One thing a run can profit from."""

    thing: str
    found: str
    used: str
    """What does its work in this version on this machine."""


def examine() -> list[Finding]:
    """Look at everything that is optional; nothing is imported that could fail."""
    threads = f"{torch.get_num_threads()} threads"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return [
        Finding("Python", platform.python_version(), f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"),
        Finding("PyTorch", str(torch.__version__), f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"),
        Finding("GPU", gpu or "none", "cuda" if gpu else f"cpu, {threads}"),
        Finding("Triton", _version("triton"), REFERENCE),
        Finding("compiled extension", "not built", REFERENCE),
        Finding("numba", _version("numba"), REFERENCE),
        Finding("DALI", _version("nvidia-dali-cuda130", "nvidia-dali-cuda120"), "torchvision's loaders"),
        Finding("apex", _apex(), "torch.optim"),
    ]


def _version(*distributions: str) -> str:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "none"


def _apex() -> str:
    """NVIDIA's apex is known by its compiled module: PyPI's package of that name is a web toolkit."""
    if importlib.util.find_spec("amp_C") is not None:
        return "NVIDIA's, with its fused kernels"
    if importlib.util.find_spec("apex") is not None:
        return "not NVIDIA's fused one (PyPI's apex is another project)"
    return "none"
