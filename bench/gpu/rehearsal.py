"""A CPU plays the GPU: Triton's interpreter and the CUDA kernels compiled for a CPU serve its tensors."""

import importlib
from types import ModuleType

import numpy as np

from dfkd_fast.kernels import dispatch

__all__ = ["environment", "prepare"]


def environment() -> dict[str, str]:
    """The variables that a process needs before it imports the kernels. Compiles the CUDA kernels, if they changed."""
    build = _cuda_on_cpu()
    variables = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if build.why_not() is None:
        variables |= {"DFKD_FAST_EXTENSION": str(build.compile_kernels()), **build.environment()}
    return variables


def prepare() -> None:
    """Let the backends of a GPU serve this process's CPU tensors, in the order in which they serve a GPU's."""
    for backend in ("numba", "triton", "cuda"):
        if backend in dispatch._SERVING["cpu"]:
            dispatch._SERVING["cpu"].remove(backend)
    for backend in ("triton", "cuda"):
        if unavailable_reason(backend) is None:
            dispatch._SERVING["cpu"].insert(0, backend)  # type: ignore[arg-type]
    # A GPU's kernels serve tensors of any size; those of a toy are too small for a CPU's to pay.
    dispatch.WORTHWHILE.update({operation: 0 for operation in dispatch.WORTHWHILE if operation not in dispatch.ON_CPU_ONLY})


def unavailable_reason(backend: str) -> str | None:
    """Why a GPU's backend cannot run on this CPU, in a line; None if it can."""
    if backend == "cuda" and (reason := _cuda_on_cpu().why_not()) is not None:
        return str(reason)
    if backend == "triton" and (reason := dispatch.why_not("triton")) is None:
        import triton

        if triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
            return "the interpreter of Triton 3.6 needs numpy < 2.4"
        return None
    return dispatch.why_not(backend)  # type: ignore[arg-type]


def _cuda_on_cpu() -> ModuleType:
    # The emulator belongs to the tests: nothing that is installed needs it.
    return importlib.import_module("tests.kernels.cuda_on_cpu.build")
