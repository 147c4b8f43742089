"""A batch norm and the leaky ReLU behind it as one operation, and spectral norm in float32."""

import itertools
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm

from dfkd_fast.kernels import batch_norm_leaky_relu

__all__ = ["BatchNormLeakyReLU2d", "SpectralNorm", "fuse_leaky_relus", "keep_spectral_norms_in_float32"]


class BatchNormLeakyReLU2d(nn.BatchNorm2d):
    """What :func:`fuse_leaky_relus` makes of a batch norm; the same parameters and buffers."""

    negative_slope: float

    def forward(self, input: Tensor) -> Tensor:
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


def fuse_leaky_relus(network: nn.Module) -> nn.Module:
    """Fuse every batch norm with the leaky ReLU that follows it in a Sequential, in place; returns the network.

    State dicts stay as they are: the ReLU's place is kept by an Identity. A layer that stands in several places is left alone, for
    what follows it in one need not follow it in another, and so is one that somebody watches by a hook.
    """
    places = Counter(id(child) for parent in network.modules() for child in parent._modules.values())
    for sequence in [module for module in network.modules() if type(module) is nn.Sequential]:
        for norm, relu in itertools.pairwise(list(sequence)):
            ordinary = type(norm) is nn.BatchNorm2d and norm.running_mean is not None and norm.momentum is not None
            watched = any(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks for layer in (norm, relu))
            if (
                ordinary
                and not watched
                and places[id(norm)] == places[id(relu)] == 1
                and type(relu) is nn.LeakyReLU
                and relu.negative_slope >= 0
            ):
                norm.__class__ = BatchNormLeakyReLU2d
                setattr(norm, "negative_slope", relu.negative_slope)  # noqa: B010  # of the class it now has
                relu.__class__ = nn.Identity  # type: ignore[assignment]
    return network


class SpectralNorm(_SpectralNorm):
    """PyTorch's parametrization of a weight, in float32 under autocast, which would round its power iteration at every product."""

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return super().forward(weight)


def keep_spectral_norms_in_float32(network: nn.Module) -> nn.Module:
    """Make every ``torch.nn.utils.parametrizations.spectral_norm`` of a network a :class:`SpectralNorm`, in place; returns the network."""
    for norm in network.modules():
        if type(norm) is _SpectralNorm:
            norm.__class__ = SpectralNorm
    return network
