"""Copies of networks that share their tensors: the copy is optimized for speed, and training it trains the network."""

from types import CellType, FunctionType, MethodType

import torch
from torch import Tensor, nn

from dfkd_fast.errors import DfkdError

from .modes import deep_copy, freeze

__all__ = ["frozen_copy", "sharing_copy"]

COMPILED = ("_compiled_call_impl",)
"""Attributes that ``module.compile()`` sets."""


def sharing_copy(network: nn.Module) -> nn.Module:
    """Returns a copy of a network that shares its parameters, buffers and hooks but has separate modules.

    Training the copy trains the network, and a hook registered on a module of either runs in both. Classes and modes of the modules
    are separate. Scripted modules cannot be copied without their tensors, so the copy contains the network's scripted modules.

    Args:
        network: the network, unchanged; modules compiled in place by ``module.compile()`` are compiled in the copy too.

    Raises:
        DfkdError: the network has an attribute that cannot be copied, or a ``__deepcopy__`` that copies its parameters.
    """
    copied = _copied(network, {id(module): module for module in network.modules() if isinstance(module, torch.jit.ScriptModule)})
    if not set(copied.parameters()) <= set(network.parameters()):  # training would update the copy's parameters instead
        raise DfkdError(f"the network {type(network).__name__} cannot be copied: a custom __deepcopy__ copies its parameters")
    return copied


def frozen_copy(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Returns a frozen copy of a network in evaluation mode that shares the storage of all tensors that already have the dtype.

    Args:
        network: the network; its modes and ``requires_grad`` flags do not change.
        dtype: dtype of the copy's floating-point parameters and buffers.

    Raises:
        DfkdError: the network has an attribute that cannot be copied.
    """
    copied = _copied(network, {})
    detached: dict[nn.Parameter, nn.Parameter] = {}
    for module in copied.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        module._buffers = dict(module._buffers)
        module._parameters = dict(module._parameters)
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                # By setattr, because recurrent layers update their list of weights there.
                setattr(module, name, detached.setdefault(parameter, nn.Parameter(parameter.detach(), requires_grad=False)))
    return freeze(copied).to(dtype)


def _copied(network: nn.Module, shared: dict[int, object]) -> nn.Module:
    modules = set(network.modules())
    for module in modules:
        compiled = "_orig_mod" in module._modules  # by torch.compile, which sets its functions again in a copy
        for name, value in vars(module).items():
            if isinstance(value, FunctionType) and not compiled and name not in COMPILED and modules & _referenced_modules(value):
                # In the copy, the function would still call the original module, in its mode and with its buffers.
                raise DfkdError(
                    f"the network {type(network).__name__} cannot be copied: the attribute {name!r} of a {type(module).__name__} is a"
                    " function that references a module of the network; make it a method, or wrap the network in another module"
                )
            # The dictionaries themselves are shared, so that replaced buffers and later hooks are shared too.
            registry = name in ("_parameters", "_buffers") or ("_hooks" in name and isinstance(value, dict))
            if registry or isinstance(value, Tensor | torch.Generator):
                shared[id(value)] = value
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            shared[id(tensor)] = tensor
    copied = deep_copy(network, shared)
    originals = dict(network.named_modules())
    for name, module in copied.named_modules():
        if name in originals and originals[name]._compiled_call_impl is not None and module._compiled_call_impl is None:
            module.compile()
    return copied


def _referenced_modules(function: FunctionType) -> set[object]:
    """Returns the modules in a function's closure and defaults, and in those of functions that these contain."""
    modules: set[object] = set()
    pending: list[object] = [function]
    visited: set[int] = set()
    while pending:
        value = pending.pop()
        if id(value) in visited:
            continue
        visited.add(id(value))
        if isinstance(value, nn.Module):
            modules.add(value)
        elif isinstance(value, MethodType):
            pending += [value.__self__, value.__func__]
        elif isinstance(value, FunctionType):
            pending += [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
            pending += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    return modules


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
