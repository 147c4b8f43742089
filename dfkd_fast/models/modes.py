"""How a network is called: its mode, whether its weights are to learn, and where its logits are."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_fast.errors import DfkdError

__all__ = ["evaluating", "logits_of", "logits_only", "untaught"]


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in, frozen ones too."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def untaught(network: nn.Module) -> Iterator[None]:
    """What is called within passes gradients on to its input, and computes none of the weights: not even what they would need is kept."""
    taught = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in taught:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in taught:
            parameter.requires_grad_(True)


def logits_of(output: Any) -> Tensor:
    """The logits in a network's output: a tensor, or a dict that has them under ``out``, as torchvision's segmenters return.

    Raises:
        DfkdError: it is neither.
    """
    logits = output.get("out") if isinstance(output, Mapping) else output
    if not isinstance(logits, Tensor):
        raise DfkdError(f"must return a tensor of logits, or a dict with one under 'out', not {type(output).__name__}")
    return logits


def logits_only(network: nn.Module, images: Tensor) -> nn.Module:
    """The network itself where it returns a tensor for images (B, C, H, W), else one that shares its parameters and does."""
    with evaluating(network):
        return network if isinstance(network(images), Tensor) else _LogitsOnly(network)


class _LogitsOnly(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.training = network.training

    def forward(self, images: Tensor) -> Tensor:
        output = self.network(images)
        return output["out"] if isinstance(output, Mapping) else output
