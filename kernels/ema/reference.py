"""Exponential moving average in plain PyTorch: the reference for the other backends."""

from collections.abc import Sequence

from torch import Tensor


def ema_update_(
    averages: Sequence[Tensor], sources: Sequence[Tensor], decay: float | Tensor, shadows: Sequence[Tensor] | None = None
) -> None:
    for average, source in zip(averages, sources, strict=True):
        if average.is_floating_point() or average.is_complex():
            average.lerp_(source.to(average.dtype), _weight(decay, average))
        else:
            average.copy_(source)
    for shadow, average in zip(shadows or (), averages, strict=shadows is not None):
        shadow.copy_(average)


def _weight(decay: float | Tensor, average: Tensor) -> float | Tensor:
    return (1 - decay).to(average.dtype) if isinstance(decay, Tensor) else 1.0 - decay
