"""Registration: one schema an operator of ``torch.ops.dfkd_fast``, one overload of it a backend.

``define("l1_forward", ...)`` makes ``torch.ops.dfkd_fast.l1_forward.numba`` and ``.triton``; the compiled
extension brings ``.cuda`` with the same schema (see csrc/library.cpp). The kernels of a backend are plain
functions of the operator's name in ``cpu.py`` or ``gpu.py`` of the operation's folder, imported at the first call:
numba and Triton take a second each.
"""

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import extension
from .dispatch import Backend, interpreting

__all__ = ["SCHEMAS", "define", "operator"]

LIBRARY = torch.library.Library("dfkd_fast", "FRAGMENT")
SCHEMAS: dict[str, str] = {}
_NUMBA: dict[str, Callable[..., Any]] = {}
_dispatch_modes = torch._C._len_torch_dispatch_stack


def define(package: str, name: str, schema: str, fake: Callable[..., Any]) -> None:
    """Register an operator in every backend.

    Args:
        package: the operation's package, whose ``cpu`` and ``gpu`` modules hold functions called ``name``.
        name: of the operator.
        schema: its arguments and results, as in ``(Tensor x) -> Tensor``.
        fake: from fake arguments to fake results.
    """
    SCHEMAS[name] = schema
    kernels = {"numba": ("cpu", ["CPU"]), "triton": ("gpu", ["CUDA", "CPU"] if interpreting() else ["CUDA"])}
    for backend, (module, keys) in kernels.items():
        LIBRARY.define(f"{name}.{backend}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        function = _at_first_call(f"{package}.{module}", name)
        for key in keys:
            LIBRARY.impl(f"{name}.{backend}", function, key)
        if backend == "numba":
            _NUMBA[name] = function
        torch.library.register_fake(f"dfkd_fast::{name}.{backend}", fake, lib=LIBRARY)
    if extension.loaded():
        torch.library.register_fake(f"dfkd_fast::{name}.cuda", fake, lib=LIBRARY)


def operator(name: str, backend: Backend, first: Tensor) -> Callable[..., Any]:
    """The operator ``name`` as a backend serves it, to be called with ``first`` foremost.

    On a CPU the way through PyTorch's dispatcher into Python costs as much as a small kernel. Where nothing on that
    way could want to see the call (no tracing, no dispatch mode, no tensor subclass), this is the function itself.
    Whoever calls an operator that writes in place tells autograd.
    """
    if backend == "numba" and type(first) is Tensor and not torch.compiler.is_compiling() and not _dispatch_modes():
        return _NUMBA[name]
    return getattr(getattr(torch.ops.dfkd_fast, name), backend)


def _at_first_call(module: str, name: str) -> Callable[..., Any]:
    @functools.cache
    def function() -> Callable[..., Any]:
        return getattr(import_module(module), name)

    return lambda *arguments: function()(*arguments)
