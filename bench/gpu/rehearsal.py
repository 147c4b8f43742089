"""Lets a CPU stand in for the GPU: Triton's interpreter and the CUDA kernels compiled for a CPU run on CPU tensors."""

import importlib
import sys
from typing import Any

import numpy as np
import torch

from dfkd_fast.kernels import Backend, dispatch

from ..provenance import version
from . import REHEARSAL

__all__ = ["environment", "prepare", "unavailable_reason"]


def environment() -> dict[str, str]:
    """Return the environment variables that must be set before the kernels are imported. Compiles the CUDA kernels if they changed."""
    build = _cuda_on_cpu()
    variables = {REHEARSAL: "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if build.unavailable_reason() is None:
        variables |= {"DFKD_FAST_EXTENSION": str(build.compile_kernels()), **build.environment()}
    return variables


def prepare() -> None:
    """Enable the GPU backends for this process's CPU tensors, in the order of a GPU."""
    preferred: tuple[Backend, ...] = ("cuda", "triton")
    dispatch.BACKENDS_BY_DEVICE["cpu"] = [*(backend for backend in preferred if unavailable_reason(backend) is None), "reference"]
    # GPU kernels have no minimum size, and toy tensors are below the CPU's. Operations that only Triton implements stay with PyTorch unless
    # forced, because the interpreter would take minutes for whole iterations.
    dispatch.MIN_NUMEL.update({name: 0 if dispatch.has_kernel(name, "cuda") else sys.maxsize for name in dispatch.MIN_NUMEL})


def unavailable_reason(backend: Backend) -> str | None:
    """Return in one line why a GPU backend is not available for this process's CPU tensors, or None."""
    if backend == "cuda" and (reason := _cuda_on_cpu().unavailable_reason()) is not None:
        return str(reason)
    if (reason := dispatch.unavailable_reason(backend)) is not None:
        return reason
    if backend == "cuda" and not torch._C._dispatch_has_kernel_for_dispatch_key("dfkd_fast::partial_moments.cuda", "CPU"):
        return "the CUDA kernels were not compiled for this CPU"
    if backend == "triton" and not dispatch.interpreting():
        return "TRITON_INTERPRET is not 1"
    if backend == "triton" and version("triton").startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return "the interpreter of Triton 3.6 needs numpy < 2.4"
    return None


def _cuda_on_cpu() -> Any:
    # The emulator is part of the tests and is not installed.
    return importlib.import_module("tests.kernels.cuda_on_cpu.build")
