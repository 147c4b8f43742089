"""Per-channel moments in plain PyTorch: the reference for the other backends."""

import torch
from torch import Tensor

DIMENSIONS = (0, 2, 3)


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x if x.dtype == torch.float64 else x.float()
    return wide.mean(dim=DIMENSIONS), wide.var(dim=DIMENSIONS, correction=0)  # var_mean returns NaN for the mean of infinite values


def channel_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.double()
    return wide.sum(dim=DIMENSIONS), wide.square().sum(dim=DIMENSIONS)
