"""How a network is called: its mode, and whether its weights are to learn; and copies of it to try."""

import copy
import itertools
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dfkd_fast.errors import USER_CODE_ERRORS, DfkdError, describe_exception
from dfkd_fast.out_of_memory import is_out_of_memory

__all__ = ["deep_copy", "dry_run", "eval_mode", "freeze", "weights_frozen"]


def freeze(network: nn.Module) -> nn.Module:
    """Put a network in evaluation mode and drop its weight gradients, in place; returns it.

    The gradient with respect to its input stays: the generator learns through it.
    """
    network.eval()  # whose result a user's own may lack
    for parameter in network.parameters():  # of a script, too, which has no requires_grad_
        parameter.requires_grad_(False)
    return network


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in, frozen ones too."""
    modes = [(module, module.training) for module in network.modules() if hasattr(module, "training")]  # frozen scripts have none
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def weights_frozen(network: nn.Module) -> Iterator[None]:
    """What is called within passes gradients on to its input, and computes none of the weights: not even what they would need is kept."""
    taught = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in taught:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in taught:
            parameter.requires_grad_(True)


def deep_copy(network: nn.Module, shared: Mapping[int, object] | None = None) -> nn.Module:
    """A copy of a network with tensors of its own, but for those that are shared.

    Args:
        network: left as it is; what it has computed and kept, as ``torch.nn.utils.weight_norm`` keeps its weight, is copied without
            its graph.
        shared: what the copy holds itself, by the id of the same in the network.

    Raises:
        DfkdError: it holds something that cannot be copied.
    """
    held = dict(shared or {})
    for module in network.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:  # no leaf, which deepcopy refuses
                held.setdefault(id(value), value.detach().clone())
    try:
        with torch.no_grad():  # or a copied script's parameters would be clones with a graph, and pass gradients on to the network's
            return copy.deepcopy(network, held)
    except USER_CODE_ERRORS as error:  # whatever a user's module holds
        if is_out_of_memory(error):
            raise
        raise DfkdError(f"the network {type(network).__name__} cannot be copied: {describe_exception(error)}") from error


@contextmanager
def dry_run(network: nn.Module) -> Iterator[nn.Module]:
    """A copy of a network, in its mode, whose calls leave no trace in the network or the process.

    Parameters, buffers, gradients and modes of the copy are its own; inside the context random states are forked, warnings are
    ignored, and compiled networks run eagerly.
    """
    devices = {tensor.device for tensor in itertools.chain(network.parameters(), network.buffers()) if tensor.is_cuda}
    with torch.random.fork_rng(devices=list(devices)), warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")
        trial = deep_copy(network)
        for own, parameter in zip(trial.parameters(), network.parameters(), strict=True):
            own.requires_grad_(parameter.requires_grad)
        yield trial
