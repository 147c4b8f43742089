"""Fusion of batch norms with the ReLUs and leaky ReLUs that follow them."""

import itertools
import math
from collections import Counter

import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast.kernels import batch_norm_leaky_relu, dispatch

__all__ = ["BatchNormLeakyReLU2d", "fuse_leaky_relus", "has_hooks"]


class BatchNormLeakyReLU2d(nn.BatchNorm2d):
    """A batch norm fused with a ReLU or leaky ReLU, made by :func:`fuse_leaky_relus`; parameters and buffers are those of ``BatchNorm2d``.

    PyTorch's layers are used if the forced backend has no kernel for the operation.
    """

    negative_slope: float
    """Negative slope of the leaky ReLU; 0 for a ReLU, 1 for no activation."""

    def forward(self, input: Tensor) -> Tensor:
        forced = dispatch.forced()
        if forced is not None and not dispatch.has_kernel("batch_norm_leaky_relu", forced):
            output = super().forward(input)
            return output if self.negative_slope == 1 else F.leaky_relu(output, self.negative_slope, inplace=True)
        self._check_input_dim(input)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return batch_norm_leaky_relu(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
            negative_slope=self.negative_slope,
        )


def fuse_leaky_relus(network: nn.Module, *, every_norm: bool = False) -> nn.Module:
    """Fuses every batch norm with the ReLU or leaky ReLU that follows it in a ``Sequential``, in place.

    The activation is replaced by ``Identity``, so the state dict keeps its keys. Layers that are registered more than once and
    layers with hooks are not fused.

    Args:
        network: the network, changed in place.
        every_norm: use the fused kernel for batch norms without an activation too, with a negative slope of 1.

    Returns:
        The network.
    """
    occurrences = Counter(id(child) for parent in network.modules() for child in parent._modules.values())
    for sequence in [module for module in network.modules() if type(module) is nn.Sequential]:
        for norm, activation in itertools.pairwise(list(sequence)):
            unshared = occurrences[id(norm)] == occurrences[id(activation)] == 1 and not has_hooks(activation)
            slope = _negative_slope(activation)
            if _is_fusible(norm) and unshared and slope >= 0:
                _fuse(norm, slope)
                activation.__class__ = nn.Identity
    if every_norm:
        for norm in network.modules():
            if _is_fusible(norm) and occurrences[id(norm)] <= 1:
                _fuse(norm, 1.0)
    return network


def _negative_slope(activation: nn.Module) -> float:
    """Returns the slope of a ReLU or leaky ReLU for negative inputs; NaN for other layers."""
    if type(activation) is nn.LeakyReLU:
        return activation.negative_slope
    return 0.0 if type(activation) is nn.ReLU else math.nan


def _is_fusible(layer: nn.Module) -> bool:
    return type(layer) is nn.BatchNorm2d and layer.running_mean is not None and layer.momentum is not None and not has_hooks(layer)


def has_hooks(layer: nn.Module) -> bool:
    """Returns True if a layer has hooks of its forward or backward pass, which a fused layer would not call."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def _fuse(norm: nn.Module, slope: float) -> None:
    norm.__class__ = BatchNormLeakyReLU2d
    setattr(norm, "negative_slope", slope)  # noqa: B010  # an attribute of the new class
