"""A batch norm and the leaky ReLU behind it as one operation."""

import itertools
from collections import Counter

import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast.kernels import batch_norm_leaky_relu, dispatch

__all__ = ["BatchNormLeakyReLU2d", "fuse_leaky_relus"]


class BatchNormLeakyReLU2d(nn.BatchNorm2d):
    """What :func:`fuse_leaky_relus` makes of a batch norm; the same parameters and buffers.

    Where a backend is forced that has no kernel for it, PyTorch's own layers compute it.
    """

    negative_slope: float
    """Of the ReLU; 1 if there is none."""

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
    """Fuse every batch norm with the leaky ReLU that follows it in a Sequential, in place; returns the network.

    State dicts stay as they are: the ReLU's place is kept by an Identity. A layer that stands in several places is left alone, for
    what follows it in one need not follow it in another, and so is one that somebody watches by a hook.

    Args:
        network: changed in place.
        every_norm: let a batch norm without a leaky ReLU behind it go through the same operation, with the slope 1.
    """
    places = Counter(id(child) for parent in network.modules() for child in parent._modules.values())
    for sequence in [module for module in network.modules() if type(module) is nn.Sequential]:
        for norm, relu in itertools.pairwise(list(sequence)):
            unshared = places[id(norm)] == places[id(relu)] == 1 and not _is_watched(relu)
            if _is_fusible(norm) and unshared and type(relu) is nn.LeakyReLU and relu.negative_slope >= 0:
                _fuse(norm, relu.negative_slope)
                relu.__class__ = nn.Identity  # type: ignore[assignment]
    if every_norm:
        for norm in network.modules():
            if _is_fusible(norm) and places[id(norm)] <= 1:
                _fuse(norm, 1.0)
    return network


def _is_fusible(layer: nn.Module) -> bool:
    return type(layer) is nn.BatchNorm2d and layer.running_mean is not None and layer.momentum is not None and not _is_watched(layer)


def _is_watched(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def _fuse(norm: nn.Module, slope: float) -> None:
    norm.__class__ = BatchNormLeakyReLU2d
    setattr(norm, "negative_slope", slope)  # noqa: B010  # of the class it now has
