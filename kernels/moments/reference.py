"""The moments in plain PyTorch: the oracle of every faster backend."""

import torch
from torch import Tensor

DIMENSIONS = (0, 2, 3)


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x if x.dtype == torch.float64 else x.float()
    variance, mean = torch.var_mean(wide, dim=DIMENSIONS, correction=0)
    return mean, variance


def channel_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.double()
    return wide.sum(dim=DIMENSIONS), wide.square().sum(dim=DIMENSIONS)
