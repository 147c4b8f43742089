"""The frozen teacher: it owes no gradient and never changes."""

from torch import nn

__all__ = ["freeze"]


def freeze(network: nn.Module) -> nn.Module:
    """Put a network in evaluation mode and drop its weight gradients, in place; returns it.

    The gradient with respect to its input stays: the generator learns through it.
    """
    return network.eval().requires_grad_(False)
