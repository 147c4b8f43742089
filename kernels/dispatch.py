"""Choice of the backend for each call.

``DFKD_FAST_BACKEND=reference|numba|triton|cuda`` forces a backend for the process, ``use_backend`` within a block of one thread
or asyncio task. If a forced backend does not support a call, an error is raised; there is no fallback. A backward pass uses the
backend of its forward pass, whichever thread runs it.

By default, CPU tensors above a size threshold use numba, CUDA tensors the compiled extension or else Triton. Everything else
uses the reference: float64, smaller tensors, other devices. Only the reference supports double backward, forward-mode
derivatives and the transforms of ``torch.func``.
"""

import os
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Literal, cast, get_args

import torch
from torch.autograd import forward_ad

from . import extension

__all__ = [
    "BACKENDS_BY_DEVICE",
    "MIN_NUMEL",
    "Backend",
    "BackendError",
    "backends",
    "check_forced",
    "choose",
    "forced",
    "has_kernel",
    "interpreting",
    "transforming",
    "unavailable_reason",
    "use_backend",
]

Backend = Literal["reference", "numba", "triton", "cuda"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
VARIABLE = "DFKD_FAST_BACKEND"
# Number of elements above which numba is faster on a CPU, forward plus backward (measured on two AVX2 cores).
MIN_NUMEL = {
    "ema_update_": 1 << 17,
    "l1_discrepancy": 1 << 18,
    "kl_discrepancy": 1 << 11,
    "js_discrepancy": 1 << 11,
    "concat_generated": 1 << 17,
    "channel_moments": 1 << 14,
    "bias_act": 1 << 23,
    "bias_act with moments": 1 << 14,
    "batch_norm_act": 1 << 20,
    "winograd_conv2d": 1 << 15,
}
# Operations that use PyTorch's own operators for calls that their kernels do not support, and the backends that have kernels.
PARTIALLY_SUPPORTED: dict[str, tuple[Backend, ...]] = {"winograd_conv2d": ("numba",)}
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # dtypes that the kernels load and store


class BackendError(ValueError):
    """The requested backend does not exist, is not installed, or does not support the call."""


def interpreting() -> bool:
    """Return whether Triton runs in interpreter mode, in which its kernels support CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable_reason(backend: Backend) -> str | None:
    """Return why a backend is unavailable, in a few words, or None if it is available."""
    return _UNAVAILABLE[backend]


def backends(device: torch.device) -> list[Backend]:
    """Return the available backends for a device, in order of preference."""
    return BACKENDS_BY_DEVICE.get(device.type, ["reference"])


def forced() -> Backend | None:
    """Return the forced backend, or None.

    Raises:
        BackendError: ``DFKD_FAST_BACKEND`` names a backend that does not exist or is not installed.
    """
    name = _current()
    if name is not None:
        _check_known(name, VARIABLE)
    return cast("Backend | None", name)


def transforming() -> bool:
    """Return whether a ``torch.func`` transform (grad, vmap, jvp, ...) or a ``torch.autograd.forward_ad`` level is active.

    Both work on PyTorch's own operators only, not on the kernels.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@contextmanager
def use_backend(backend: Backend | None) -> Iterator[None]:
    """Context manager that forces a backend in the current thread or asyncio task.

    Threads started inside the block use ``DFKD_FAST_BACKEND`` again, unless they run in a copy of the context, as those of
    ``asyncio.to_thread`` do.

    Args:
        backend: "reference", "numba", "triton" or "cuda"; None restores the automatic choice.

    Raises:
        BackendError: the backend does not exist or is not installed.

    Examples:
        >>> import torch
        >>> from dfkd_fast.kernels import channel_moments, use_backend
        >>> with use_backend("reference"):
        ...     mean, variance = channel_moments(torch.ones(2, 3, 4, 4))
        >>> variance
        tensor([0., 0., 0.])
    """
    if backend is not None:
        _check_known(backend, "backend")
    if torch.compiler.is_compiling():
        traced = getattr(_thread, "traced", None)
        _thread.traced = (backend,)
        try:
            yield
        finally:
            _thread.traced = traced
        return
    token = _context.set(backend)
    if not _CONTEXT_IS_TRACED:
        _thread.traced = (backend,)
    try:
        yield
    finally:
        _context.reset(token)
        if not _CONTEXT_IS_TRACED:
            _thread.traced = (_context.get(),)


def choose(operation: str, device: torch.device, dtypes: Collection[torch.dtype], elements: int) -> Backend:
    """Return the backend for a call.

    Args:
        operation: name of the operation, a key of ``MIN_NUMEL``.
        device: device of all tensors.
        dtypes: dtypes of the floating-point tensors.
        elements: number of input elements.

    Raises:
        BackendError: a forced backend does not support the device, a dtype or an active transform.
    """
    name = forced()
    transformed = transforming()
    unsupported = [dtype for dtype in dtypes if dtype not in KERNEL_DTYPES]
    if name is None:
        if transformed or unsupported or (device.type == "cpu" and elements < MIN_NUMEL[operation]):
            return "reference"
        return backends(device)[0]
    if name != "reference":
        if name not in backends(device):
            raise BackendError(f"the backend {name} is forced, but does not support {device.type} tensors")
        if unsupported:
            raise BackendError(f"the backend {name} is forced, but supports float32, bfloat16 and float16, not {unsupported[0]}")
        if transformed:
            raise BackendError(f"the backend {name} is forced, but only the reference supports torch.func and forward-mode derivatives")
    return name


def has_kernel(operation: str, backend: Backend) -> bool:
    """Return whether a backend implements an operation; the reference implements all."""
    return backend == "reference" or backend in PARTIALLY_SUPPORTED.get(operation, BACKENDS)


def check_forced(operation: str, device: torch.device) -> None:
    """Check the forced backend for an operation that does not call ``choose``.

    Raises:
        BackendError: the forced backend has no kernel for the operation, or does not support the device; of the operations of
            ``PARTIALLY_SUPPORTED`` only if it is a GPU backend.
    """
    name = forced()
    if name is None:
        return
    if not has_kernel(operation, name):
        raise BackendError(f"the backend {name} is forced, but has no kernel for {operation}")
    strict = name in ("triton", "cuda") or (name != "reference" and operation not in PARTIALLY_SUPPORTED)
    if strict and name not in backends(device):
        raise BackendError(f"the backend {name} is forced, but does not support {device.type} tensors")


def _current() -> str | None:
    if not torch.compiler.is_compiling():
        return _context.get()
    traced = getattr(_thread, "traced", None)
    if traced is not None:
        return cast("tuple[str | None]", traced)[0]
    return _context.get() if _CONTEXT_IS_TRACED else _environment


def _check_known(backend: str, where: str) -> None:
    if backend not in BACKENDS:
        raise BackendError(f"{where} must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if (reason := _UNAVAILABLE[backend]) is not None:
        raise BackendError(f"{where} is {backend!r}, which is unavailable: {reason}")


def _without_numba() -> str | None:
    # The kernels use LLVM intrinsics and cannot run as plain Python.
    off = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")
    return _missing("numba") or ("NUMBA_DISABLE_JIT is set" if off else None)


def _missing(package: str) -> str | None:
    return None if find_spec(package) else f"{package} is not installed"


_UNAVAILABLE: dict[str, str | None] = {
    "reference": None,
    "numba": _without_numba(),
    "triton": _missing("triton"),
    "cuda": extension.load_error(),
}
_PREFERENCE: dict[str, tuple[Backend, ...]] = {
    "cuda": ("cuda", "triton", "reference"),
    "cpu": ("numba", "triton", "reference") if interpreting() else ("numba", "reference"),
}
BACKENDS_BY_DEVICE: dict[str, list[Backend]] = {
    device: [backend for backend in preferred if _UNAVAILABLE[backend] is None] for device, preferred in _PREFERENCE.items()
}
"""Available backends per device type, in order of preference; modified by the tests that run GPU kernels on a CPU."""
# Validated at the first call, because an exception during import would hide its message in a long traceback.
_environment: str | None = os.environ.get(VARIABLE) or None
_context: ContextVar[str | None] = ContextVar("dfkd_fast_backend", default=_environment)
# Dynamo cannot trace ContextVar.set, nor ContextVar.get before 2.14: compiled code reads a thread-local and is guarded on it.
_thread = threading.local()
_CONTEXT_IS_TRACED = torch.__version__ >= "2.14"
