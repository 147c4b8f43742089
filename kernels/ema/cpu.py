"""Exponential moving average in numba: one parallel loop over the blocks of all tensors."""

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from .. import simd
from ..simd import HALF, ONE

__all__ = ["ema_update_"]


def ema_update_(averages: list[Tensor], sources: list[Tensor], shadows: list[Tensor], decay: float, device_decay: Tensor | None) -> None:
    tables: dict[tuple[Any, Any], list[tuple[int, int, int, int]]] = {}
    for average, source, shadow in zip(averages, sources, shadows or averages, strict=True):
        if average.dtype == torch.float32:
            table = tables.setdefault((source.dtype, shadow.dtype), [])
            table.append((average.data_ptr(), source.data_ptr(), shadow.data_ptr(), average.numel()))
    integers = [index for index, average in enumerate(averages) if not average.is_floating_point()]
    for copies in (averages, shadows):
        if integers and copies:
            torch._foreach_copy_([copies[index] for index in integers], [sources[index] for index in integers])
    weight = 1.0 - (decay if device_decay is None else device_decay.item())
    with simd.threads:
        for (source_dtype, shadow_dtype), table in tables.items():
            _update(np.array(table), simd.element_type(source_dtype), simd.element_type(shadow_dtype), weight, bool(shadows))


@simd.parallel
def _update(table: Any, source_as: Any, shadow_as: Any, weight: float, shadowed: bool) -> None:
    ends = np.cumsum(-(-table[:, 3] // simd.BLOCK))
    w, rest = np.float32(weight), np.float32(1.0 - weight)
    for block in prange(ends[-1]):
        tensor = np.searchsorted(ends, block, side="right")
        average_at, source_at, shadow_at, size = table[tensor]
        first = (block - (ends[tensor - 1] if tensor else 0)) * simd.BLOCK
        average, source = simd.pointer((average_at, ONE)), simd.pointer((source_at, source_as))
        # Two loops, because possible aliasing of shadow and average would prevent vectorization of the second.
        if shadowed:
            shadow = simd.pointer((shadow_at, shadow_as))
            for i in range(first, min(first + simd.BLOCK, size)):
                average[i] = _lerp(average[i], simd.widen(source[i]), w, rest)
                shadow[i] = simd.narrow(average[i], (shadow_at, shadow_as))
        else:
            for i in range(first, min(first + simd.BLOCK, size)):
                average[i] = _lerp(average[i], simd.widen(source[i]), w, rest)


@simd.inline
def _lerp(old: Any, new: Any, weight: Any, rest: Any) -> Any:
    """The formula of ``torch.lerp``, exact for weights 0 and 1."""
    return old + weight * (new - old) if weight < HALF else new - rest * (new - old)
