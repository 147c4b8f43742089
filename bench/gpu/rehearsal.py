"""A CPU plays the GPU: Triton's interpreter and the CUDA kernels compiled for a CPU serve its tensors."""

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
    """The variables that a process needs before it imports the kernels. Compiles the CUDA kernels, if they changed."""
    build = _cuda_on_cpu()
    variables = {REHEARSAL: "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if build.why_not() is None:
        variables |= {"DFKD_FAST_EXTENSION": str(build.compile_kernels()), **build.environment()}
    return variables


def prepare() -> None:
    """Let the backends of a GPU serve this process's CPU tensors, in the order in which they serve a GPU's."""
    preferred: tuple[Backend, ...] = ("cuda", "triton")
    dispatch.SERVING["cpu"] = [*(backend for backend in preferred if unavailable_reason(backend) is None), "reference"]
    # A GPU's kernels serve tensors of any size; those of a toy are too small for a CPU's to pay. What only Triton has stays with PyTorch
    # unless it is forced: the interpreter would take minutes for whole iterations.
    dispatch.WORTHWHILE.update({name: 0 if dispatch.has_kernel(name, "cuda") else sys.maxsize for name in dispatch.WORTHWHILE})


def unavailable_reason(backend: Backend) -> str | None:
    """Why a GPU's backend does not serve this process's CPU tensors, in a line; None if it can."""
    if backend == "cuda" and (reason := _cuda_on_cpu().why_not()) is not None:
        return str(reason)
    if (reason := dispatch.why_not(backend)) is not None:
        return reason
    if backend == "cuda" and not torch._C._dispatch_has_kernel_for_dispatch_key("dfkd_fast::moments_forward.cuda", "CPU"):
        return "the CUDA kernels were not compiled for this CPU"
    if backend == "triton" and not dispatch.interpreting():
        return "TRITON_INTERPRET is not 1"
    if backend == "triton" and version("triton").startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return "the interpreter of Triton 3.6 needs numpy < 2.4"
    return None


def _cuda_on_cpu() -> Any:
    # The emulator belongs to the tests: nothing that is installed needs it.
    return importlib.import_module("tests.kernels.cuda_on_cpu.build")
