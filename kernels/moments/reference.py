"""Per-channel moments in plain PyTorch: the reference for the other backends."""

from collections.abc import Sequence

import torch
from torch import Tensor

DIMENSIONS = (0, 2, 3)


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x if x.dtype == torch.float64 else x.float()
    if not x.numel():
        nan = wide.sum(dim=DIMENSIONS) / 0
        return nan, nan.clone()
    # mean and var alone are inaccurate for some strides, but var_mean returns NaN for the mean of infinite values.
    variance, mean = torch.var_mean(wide, dim=DIMENSIONS, correction=0)
    return torch.where(mean.isfinite(), mean, wide.mean(dim=DIMENSIONS)), variance


def channel_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.double()
    return wide.sum(dim=DIMENSIONS), wide.square().sum(dim=DIMENSIONS)


def partial_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return one part, about the mean."""
    mean, variance = channel_moments(x)
    center = torch.where(mean.isfinite(), mean, 0).detach()
    square = variance + torch.where(mean.isfinite(), mean - center, 0).square()
    return torch.stack([mean - center, square]).unsqueeze(2), center


def combine_moments(parts: Sequence[Tensor], centers: Sequence[Tensor], scale: Tensor | None, shift: Tensor | None) -> Tensor:
    width = max(map(len, centers))
    paddings = [center.new_zeros(width - len(center)) for center in centers]

    def table(rows: Sequence[Tensor]) -> Tensor:
        padded = [part for pair in zip(rows, paddings, strict=True) for part in pair]
        return torch.cat(padded).view(len(centers), width)

    sums = [part.sum(2) if part.shape[2] else part.new_full(part.shape[:2], torch.nan) for part in parts]
    center, offset, square = table(centers), table([each[0] for each in sums]), table([each[1] for each in sums])
    variance = square - offset.square()
    moments = torch.stack([center + offset, torch.where(variance < 0, 0, variance)])
    scaled = moments if scale is None else moments * scale
    return scaled if shift is None else scaled + shift
