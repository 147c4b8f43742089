"""Exponential moving average of a list of tensors, in place."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference

__all__ = ["ema_update_"]


def ema_update_(averages: Sequence[Tensor], sources: Sequence[Tensor], decay: float | Tensor) -> None:
    """``averages ← decay · averages + (1 − decay) · sources``, in place (MAD, arXiv 2209.10359).

    Computed as ``average + (1 − decay)(source − average)``, so that equal tensors stay equal. Integer
    tensors are copied, having no average.

    Args:
        averages: tensors of any shapes, on one device; floating ones in float32 or float64, because
            half precision would drop the increment ``(1 − decay)(source − average)``.
        sources: as many tensors, each of the shape and strides of its average; float32, float64,
            bfloat16 or float16.
        decay: in [0, 1]; a float, or a 0-d tensor on the tensors' device so that a captured CUDA graph
            can see it change.

    Raises:
        ValueError: the lists differ in length, or a pair differs in shape, strides, device or kind of
            dtype; the message names the index.
    """
    _check(averages, sources, decay)
    with torch.no_grad():
        reference.ema_update_(averages, sources, decay)


def _check(averages: Sequence[Tensor], sources: Sequence[Tensor], decay: float | Tensor) -> None:
    if len(averages) != len(sources):
        raise ValueError(f"averages and sources differ in length: {len(averages)} and {len(sources)}")
    if isinstance(decay, Tensor):
        if decay.ndim != 0:
            raise ValueError(f"decay must be a float or a 0-d tensor, not one of shape {tuple(decay.shape)}")
    elif not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay must be in [0, 1], not {decay}")
    for index, (average, source) in enumerate(zip(averages, sources, strict=True)):
        where = f"pair {index}: average and source differ in"
        if average.shape != source.shape:
            raise ValueError(f"{where} shape: {tuple(average.shape)} and {tuple(source.shape)}")
        if _strides(average) != _strides(source):
            raise ValueError(f"{where} strides: {average.stride()} and {source.stride()}")
        if average.device != source.device or average.device != averages[0].device:
            raise ValueError(f"{where} device: {average.device} and {source.device}, the first is on {averages[0].device}")
        if not average.is_floating_point():
            if average.dtype != source.dtype:
                raise ValueError(f"{where} dtype: {average.dtype} and {source.dtype}")
        elif not source.is_floating_point():
            raise ValueError(f"{where} dtype: {average.dtype} and {source.dtype}")
        elif average.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"pair {index}: an average must be float32 or float64, not {average.dtype}")


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of the dimensions that have more than one element: the others move nothing."""
    return tuple(stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
