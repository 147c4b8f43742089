"""Evaluation mode, frozen weights, and copies of networks."""

import copy
import itertools
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd_fast.errors import USER_CODE_ERRORS, DfkdError, describe_exception
from dfkd_fast.out_of_memory import is_out_of_memory

__all__ = ["deep_copy", "dry_run", "eval_mode", "freeze", "keep_running_statistics", "weights_frozen"]


def freeze(network: nn.Module) -> nn.Module:
    """Puts a network in evaluation mode and disables the gradients of its parameters, in place; returns the network.

    Gradients with respect to its input are still computed.
    """
    network.eval()  # the return value is not used, since a user's eval may return None
    for parameter in network.parameters():  # scripted modules have no requires_grad_
        parameter.requires_grad_(False)
    return network


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Context manager that sets evaluation mode and disables gradients; restores the mode of every module on exit."""
    modes = [(module, module.training) for module in network.modules() if hasattr(module, "training")]  # frozen scripts have no mode
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def weights_frozen(network: nn.Module) -> Iterator[None]:
    """Context manager that disables the gradients of a network's parameters, so that no activations are saved for them.

    Gradients with respect to the input are still computed.
    """
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def deep_copy(network: nn.Module, shared: Mapping[int, object] | None = None) -> nn.Module:
    """Returns a deep copy of a network that may share some of its objects.

    Args:
        network: the network, unchanged. Tensors with a graph, such as the weight of ``torch.nn.utils.weight_norm``, are copied
            without it.
        shared: objects that the copy uses in place of the network's, by the ``id`` of the network's object.

    Raises:
        DfkdError: the network has an attribute that cannot be copied.
    """
    memo = dict(shared or {})
    for module in network.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:  # deepcopy supports leaf tensors only
                memo.setdefault(id(value), value.detach().clone())
    try:
        with torch.no_grad():  # otherwise a copied script's parameters would be clones with a graph to the original's
            return copy.deepcopy(network, memo)
    except USER_CODE_ERRORS as error:  # raised by attributes of a user's module
        if is_out_of_memory(error):
            raise
        raise DfkdError(f"the network {type(network).__name__} cannot be copied: {describe_exception(error)}") from error


@contextmanager
def dry_run(network: nn.Module) -> Iterator[nn.Module]:
    """Context manager that yields a copy of a network in the same mode, for forward passes without side effects.

    The copy has separate parameters, buffers, gradients and modes. Within the context, random states are forked, warnings are
    ignored, and compiled networks run eagerly.
    """
    devices = {tensor.device for tensor in itertools.chain(network.parameters(), network.buffers()) if tensor.is_cuda}
    with torch.random.fork_rng(devices=list(devices)), warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")
        trial = deep_copy(network)
        for copied, parameter in zip(trial.parameters(), network.parameters(), strict=True):
            copied.requires_grad_(parameter.requires_grad)
        yield trial


@contextmanager
def keep_running_statistics(network: nn.Module) -> Iterator[None]:
    """Context manager in which batch norms leave their running statistics unchanged; in training mode they still normalize by the batch."""
    norms = [(norm, norm.momentum) for norm in network.modules() if isinstance(norm, _BatchNorm)]
    for norm, _ in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in norms:
            norm.momentum = momentum
