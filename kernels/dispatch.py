"""Which backend serves a call.

``DFKD_FAST_BACKEND=reference|numba|triton|cuda`` forces one for the process, ``use_backend`` for a block of one thread or
asyncio task. A forced backend that cannot serve a call is an error, never another backend. A backward pass, whichever
thread runs it, stays with the backend that its forward pass chose.

Unforced, CPU tensors of some size go to numba, CUDA tensors to the compiled extension or else to Triton, and the
reference serves what they do not: float64, tensors too small to be worth the call, other devices. The reference
alone has second derivatives, forward-mode derivatives and the transforms of ``torch.func``.
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
    "MIN_NUMEL",
    "SERVING",
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
# Elements of an operation's tensors from which, on a CPU, numba was faster, forward and backward (two AVX2 cores).
MIN_NUMEL = {
    "ema_update_": 1 << 17,
    "l1_discrepancy": 1 << 18,
    "kl_discrepancy": 1 << 11,
    "js_discrepancy": 1 << 11,
    "concat_generated": 1 << 17,
    "channel_moments": 1 << 14,
    "batch_norm_leaky_relu": 1 << 20,
    "winograd_conv2d": 1 << 15,
}
# Operations that leave the calls which their kernels do not serve to PyTorch, and the backends that have kernels for them.
PARTIALLY_SUPPORTED: dict[str, tuple[Backend, ...]] = {"batch_norm_leaky_relu": ("numba", "triton"), "winograd_conv2d": ("numba",)}
STORAGE = (torch.float32, torch.bfloat16, torch.float16)  # what the kernels read and write


class BackendError(ValueError):
    """A backend was asked for that does not exist, is not installed, or cannot serve the call."""


def interpreting() -> bool:
    """Whether Triton's interpreter runs its kernels: then they serve CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable_reason(backend: Backend) -> str | None:
    """None if the backend is installed, else the reason in a few words."""
    return _ABSENT[backend]


def backends(device: torch.device) -> list[Backend]:
    """The installed backends that serve a device, the preferred one first."""
    return SERVING.get(device.type, ["reference"])


def forced() -> Backend | None:
    """The backend that is forced, if one is.

    Raises:
        BackendError: ``DFKD_FAST_BACKEND`` names one that does not exist or is not installed.
    """
    name = _current()
    if name is not None:
        _check_known(name, VARIABLE)
    return cast("Backend | None", name)


def transforming() -> bool:
    """Whether a transform of ``torch.func`` (grad, vmap, jvp, hessian, ...) or a level of ``torch.autograd.forward_ad`` is active.

    Then only PyTorch's own operators see what is computed, not the kernels.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@contextmanager
def use_backend(backend: Backend | None) -> Iterator[None]:
    """Force a backend within the block, in this thread or asyncio task; None chooses freely there.

    A thread started in the block begins with ``DFKD_FAST_BACKEND`` again, unless it runs in a copy of the context, as
    those of ``asyncio.to_thread`` do.

    Raises:
        BackendError: the backend does not exist or is not installed.
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
    """The backend for a call.

    Args:
        operation: its name, a key of ``MIN_NUMEL``.
        device: that all its tensors are on.
        dtypes: of its floating-point tensors.
        elements: how many it reads.

    Raises:
        BackendError: a backend is forced that cannot serve them.
    """
    name = forced()
    transformed = transforming()
    others = [dtype for dtype in dtypes if dtype not in STORAGE]
    if name is None:
        if transformed or others or (device.type == "cpu" and elements < MIN_NUMEL[operation]):
            return "reference"
        return backends(device)[0]
    if name != "reference":
        if name not in backends(device):
            raise BackendError(f"the backend {name} is forced, but does not serve {device.type} tensors")
        if others:
            raise BackendError(f"the backend {name} is forced, but serves float32, bfloat16 and float16, not {others[0]}")
        if transformed:
            raise BackendError(f"the backend {name} is forced, but the reference alone serves torch.func and forward-mode derivatives")
    return name


def has_kernel(operation: str, backend: Backend) -> bool:
    """Whether a backend has the operation at all; the reference always has."""
    return backend == "reference" or backend in PARTIALLY_SUPPORTED.get(operation, BACKENDS)


def check_forced(operation: str, device: torch.device) -> None:
    """Check an operation that does not ask ``choose``, because it leaves single calls to PyTorch.

    Raises:
        BackendError: a backend is forced that has no kernel for it, or a GPU's for tensors of another device.
    """
    name = forced()
    if name is None:
        return
    if not has_kernel(operation, name):
        raise BackendError(f"the backend {name} is forced, but has no kernel for {operation}")
    if name in ("triton", "cuda") and name not in backends(device):
        raise BackendError(f"the backend {name} is forced, but does not serve {device.type} tensors")


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
    if (reason := _ABSENT[backend]) is not None:
        raise BackendError(f"{where} is {backend!r}, which is not here: {reason}")


def _without_numba() -> str | None:
    # The kernels are machine code by way of LLVM: as plain Python they mean nothing.
    off = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")
    return _missing("numba") or ("NUMBA_DISABLE_JIT is set" if off else None)


def _missing(package: str) -> str | None:
    return None if find_spec(package) else f"{package} is not installed"


_ABSENT: dict[str, str | None] = {
    "reference": None,
    "numba": _without_numba(),
    "triton": _missing("triton"),
    "cuda": extension.load_error(),
}
_PREFERRED: dict[str, tuple[Backend, ...]] = {
    "cuda": ("cuda", "triton", "reference"),
    "cpu": ("numba", "triton", "reference") if interpreting() else ("numba", "reference"),
}
SERVING: dict[str, list[Backend]] = {
    device: [backend for backend in preferred if _ABSENT[backend] is None] for device, preferred in _PREFERRED.items()
}
"""The installed backends that serve a device's tensors, the preferred one first; what tests a GPU's kernels on a CPU changes it."""
# Checked at the first call: an import that fails could not say so in one line.
_environment: str | None = os.environ.get(VARIABLE) or None
_context: ContextVar[str | None] = ContextVar("dfkd_fast_backend", default=_environment)
# Dynamo traces no ContextVar.set, and before 2.14 no get: compiled code reads what the thread holds, and is guarded by it.
_thread = threading.local()
_CONTEXT_IS_TRACED = torch.__version__ >= "2.14"
