"""Copies of a network's modules that share its tensors: the copy is changed for speed, the network is trained."""

from types import CellType, FunctionType, MethodType

import torch
from torch import Tensor, nn

from dfkd_fast.errors import DfkdError

from .modes import deep_copy, freeze

__all__ = ["frozen_copy", "sharing_copy"]

COMPILED = ("_compiled_call_impl",)
"""What ``module.compile()`` sets."""


def sharing_copy(network: nn.Module) -> nn.Module:
    """A copy of a network's modules that shares its parameters, buffers and hooks.

    Training the copy trains the network, and a hook registered on a module of either runs in both, but classes and modes are the
    copy's own. Scripted modules cannot be copied without their tensors: those are the network's own modules.

    Args:
        network: left as it is; a module compiled in place by ``module.compile()`` is compiled in the copy as well.

    Raises:
        DfkdError: it holds something that cannot be copied.
    """
    copied = _copied(network, {id(module): module for module in network.modules() if isinstance(module, torch.jit.ScriptModule)})
    if not set(copied.parameters()) <= set(network.parameters()):  # the steps would train them in the network's place
        raise DfkdError(f"the network {type(network).__name__} cannot be copied: a __deepcopy__ of its own copies its parameters")
    return copied


def frozen_copy(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in evaluation mode that computes no weight gradients and shares the network's memory where it is of that dtype.

    Args:
        network: left as it is, its modes and what it trains included.
        dtype: of the copy's floating-point parameters and buffers.

    Raises:
        DfkdError: it holds something that cannot be copied.
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
                # By assignment, since recurrent layers keep a list of their weights, too.
                setattr(module, name, detached.setdefault(parameter, nn.Parameter(parameter.detach(), requires_grad=False)))
    return freeze(copied).to(dtype)


def _copied(network: nn.Module, shared: dict[int, object]) -> nn.Module:
    modules = set(network.modules())
    for module in modules:
        compiled = "_orig_mod" in module._modules  # by torch.compile, which sets its functions anew in a copy
        for name, value in vars(module).items():
            if isinstance(value, FunctionType) and not compiled and name not in COMPILED and modules & _held(value):
                # A copy of the module would still call the original through it, in the mode that has, and train or read its buffers.
                raise DfkdError(
                    f"the network {type(network).__name__} cannot be copied: the attribute {name!r} of a {type(module).__name__} is a"
                    " function that holds a module of the network; make it a method, or wrap the network in a module of its own"
                )
            # The very dictionaries, so that a buffer that is replaced and a hook that is registered later are shared as well.
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


def _held(function: FunctionType) -> set[object]:
    """The modules that a function, or a function that this one calls by its closure, has in its closure or defaults."""
    held: set[object] = set()
    pending: list[object] = [function]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            held.add(value)
        elif isinstance(value, MethodType):
            pending += [value.__self__, value.__func__]
        elif isinstance(value, FunctionType):
            pending += [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
            pending += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    return held


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
