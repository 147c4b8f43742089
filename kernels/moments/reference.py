"""The moments in plain PyTorch: the oracle of every faster backend."""

import torch
from torch import Tensor

DIMENSIONS = (0, 2, 3)


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x if x.dtype == torch.float64 else x.float()
    return wide.mean(dim=DIMENSIONS), wide.var(dim=DIMENSIONS, correction=0)  # var_mean's mean of an infinity is NaN


def channel_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.double()
    return wide.sum(dim=DIMENSIONS), wide.square().sum(dim=DIMENSIONS)
