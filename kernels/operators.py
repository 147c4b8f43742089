"""Registration of the operators in ``torch.ops.dfkd_fast``: one schema per operator, one overload per backend.

``define("l1_forward", ...)`` registers ``torch.ops.dfkd_fast.l1_forward.numba`` and ``.triton``; the compiled extension
registers ``.cuda`` with the same schema (see csrc/library.cpp). A backend implements an operator as a function of the same name
in ``cpu.py`` or ``gpu.py`` of the operation's package. These modules are imported at the first call, because numba and Triton
take a second each to import.
"""

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import extension
from .dispatch import Backend, interpreting

__all__ = ["SCHEMAS", "define", "differentiable", "operator"]

LIBRARY = torch.library.Library("dfkd_fast", "FRAGMENT")
SCHEMAS: dict[str, str] = {}
_NUMBA: dict[str, Callable[..., Any]] = {}
_dispatch_modes = torch._C._len_torch_dispatch_stack


def define(package: str, name: str, schema: str, fake: Callable[..., Any]) -> None:
    """Register an operator for every backend.

    Args:
        package: package of the operation, whose ``cpu`` and ``gpu`` modules have functions called ``name``.
        name: name of the operator.
        schema: arguments and results, as in ``(Tensor x) -> Tensor``.
        fake: fake (meta) implementation, for ``torch.library.register_fake``.
    """
    SCHEMAS[name] = schema
    kernels = {"numba": ("cpu", ["CPU"]), "triton": ("gpu", ["CUDA", "CPU"] if interpreting() else ["CUDA"])}
    for backend, (module, keys) in kernels.items():
        LIBRARY.define(f"{name}.{backend}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        function = _import_on_first_call(f"{package}.{module}", name)
        for key in keys:
            LIBRARY.impl(f"{name}.{backend}", function, key)
        if backend == "numba":
            _NUMBA[name] = function
        torch.library.register_fake(f"dfkd_fast::{name}.{backend}", fake, lib=LIBRARY)
    if extension.loaded():
        torch.library.register_fake(f"dfkd_fast::{name}.cuda", fake, lib=LIBRARY)


def operator(name: str, backend: Backend, first: Tensor) -> Callable[..., Any]:
    """Return an operator's implementation in a backend.

    On a CPU, PyTorch's dispatcher costs as much as a small kernel. If nothing needs to intercept the call (no tracing, no dispatch
    mode, no tensor subclass), the Python function is returned instead. The caller of an operator that writes in place must bump
    the version counters of the tensors.

    Args:
        name: name of the operator.
        backend: backend that implements it.
        first: first tensor argument of the call.
    """
    if backend == "numba" and type(first) is Tensor and not torch.compiler.is_compiling() and not _dispatch_modes():
        return _NUMBA[name]
    return getattr(getattr(torch.ops.dfkd_fast, name), backend)


def differentiable(name: str, schema: str, function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return a callable that applies an autograd function, in compiled code through an operator ``torch.ops.dfkd_fast.name``.

    Dynamo makes the gradients that an autograd function receives contiguous, which copies those of channels-last images. It does not
    trace into the operator, and AOTAutograd traces the function with gradients of any strides.

    Args:
        name: name of the operator, registered for this purpose only.
        schema: arguments and results of the function.
        function: autograd function whose ``forward`` calls operators that do not write in place.
    """
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, lambda *arguments: function.apply(*arguments), "CompositeImplicitAutograd")
    traced = getattr(torch.ops.dfkd_fast, name).default

    def apply(*arguments: Any) -> Any:
        return traced(*arguments) if torch.compiler.is_compiling() else function.apply(*arguments)

    return apply


def _import_on_first_call(module: str, name: str) -> Callable[..., Any]:
    @functools.cache
    def function() -> Callable[..., Any]:
        return getattr(import_module(module), name)

    return lambda *arguments: function()(*arguments)
