"""Per-channel moments in numba.

Sums are accumulated in float64, so that the variance does not lose precision if the mean is large; the kernels are memory-bound.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from .. import simd
from ..simd import ONE, TypedPointer

__all__ = ["combine_moments", "finish_moments", "moments_backward", "partial_moments"]

ACTIVATIONS = {"none": 0, "tanh": 1, "sigmoid": 2}


def partial_moments(x: Tensor, activation: str, blocks: int) -> tuple[Tensor, Tensor]:
    """See kernels/moments: the first two parts are about the mean, the others are 0."""
    x, channels_last = _dense(x)
    count, channels, height, width = x.shape
    sums, center = torch.zeros((2, channels, 2 * blocks)), torch.empty(channels)
    kernel = _sum_rows if channels_last else _sum_planes
    tensors = map(simd.typed_pointer, (x, sums, center))
    with simd.threads:
        kernel(*tensors, blocks, count, channels, height * width, ACTIVATIONS[activation])
    return sums, center


def combine_moments(
    parts: Sequence[Tensor], centers: Sequence[Tensor], scale: Tensor | None, shift: Tensor | None, raw: bool
) -> tuple[Tensor, Tensor]:
    width = max(map(len, centers))
    parts, centers = [part.contiguous() for part in parts], [center.contiguous() for center in centers]
    table = np.array([(part.data_ptr(), center.data_ptr(), *part.shape[1:]) for part, center in zip(parts, centers, strict=True)])
    moments, offsets = torch.empty((2, len(parts), width), dtype=torch.float64), torch.empty((len(parts), width))
    constants = [offsets if constant is None else constant for constant in (scale, shift)]
    flags = scale is not None, shift is not None, raw
    with simd.threads:
        _combine(table, *map(simd.typed_pointer, (moments, offsets, *constants)), *flags, width)
    return moments if raw else moments.float(), offsets


def moments_backward(x: Tensor, grad_mean: Tensor, grad_variance: Tensor, center: Tensor, scale: float) -> Tensor:
    """Return scale · (grad_mean + 2 · grad_variance · (x − center)) with per-channel constants."""
    dense, channels_last = _dense(x)
    count, channels, height, width = x.shape
    gradient = torch.empty_like(dense)
    kernel = _gradient_rows if channels_last else _gradient_planes
    tensors = map(simd.typed_pointer, (dense, gradient, grad_mean, grad_variance, center))
    with simd.threads:
        kernel(*tensors, np.float32(scale), count, channels, height * width)
    return simd.restride_like(gradient, x)


def _dense(x: Tensor) -> tuple[Tensor, bool]:
    """Return x as a dense tensor, and whether it is channels-last."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return x.contiguous(), False
    return x, True


@simd.inline
def _activated(x: Any, activation: int) -> Any:
    value = simd.widen(x)
    if activation == 1:
        return simd.tanh(value)
    return simd.sigmoid(value) if activation == 2 else value


@simd.parallel
def _sum_planes(
    x: TypedPointer, sums: TypedPointer, center: TypedPointer, blocks: int, count: int, channels: int, pixels: int, activation: int
) -> None:
    source = simd.pointer(x)
    partial = np.empty((count, 2, channels))
    for plane in prange(count * channels):
        a, b = 0.0, 0.0
        for i in range(plane * pixels, (plane + 1) * pixels):
            value = np.float64(_activated(source[i], activation))
            a += value
            b += value * value
        partial[plane // channels, 0, plane % channels], partial[plane // channels, 1, plane % channels] = a, b
    finish_moments(sums, center, blocks, _total(partial), count * pixels)


@simd.parallel
def _sum_rows(
    x: TypedPointer, sums: TypedPointer, center: TypedPointer, blocks: int, count: int, channels: int, pixels: int, activation: int
) -> None:
    source = simd.pointer(x)
    rows, period = count * pixels, _period(channels)
    rows_per_block = max(1, simd.BLOCK // period) * (period // channels)
    partial = np.zeros((-(-rows // rows_per_block), 2, channels))
    for block in prange(len(partial)):
        start, end = block * rows_per_block * channels, min((block + 1) * rows_per_block, rows) * channels
        a, b = np.zeros(period), np.zeros(period)
        for group in range(start, end, period):
            for i in range(min(period, end - group)):
                value = np.float64(_activated(source[group + i], activation))
                a[i] += value
                b[i] += value * value
        for i in range(period):
            partial[block, 0, i % channels] += a[i]
            partial[block, 1, i % channels] += b[i]
    finish_moments(sums, center, blocks, _total(partial), rows)


@simd.helper
def _total(partial: Any) -> Any:
    """Add sums (blocks, 2, C) in order."""
    totals = np.zeros(partial.shape[1:])
    for block in range(len(partial)):
        totals += partial[block]
    return totals


@simd.helper
def finish_moments(sums: TypedPointer, center: TypedPointer, blocks: int, totals: Any, elements: int) -> None:
    """Write the mean in float32, and the moments about it as the first two parts, from float64 sums of x and x²."""
    out, centers, channels = simd.pointer(sums), simd.pointer(center), totals.shape[1]
    for c in range(channels if blocks else 0):
        first, second = totals[0, c] / elements, totals[1, c] / elements
        mean = np.float32(first)
        if np.isfinite(mean):
            variance, first = second - first * first, first - np.float64(mean)
            second = (0.0 if variance < 0 else variance) + first * first
        else:
            mean = np.float32(0)
        centers[c] = mean
        for row, moment in ((c, first), (channels + c, second)):
            high = np.float32(moment)
            out[2 * blocks * row] = high
            out[2 * blocks * row + 1] = np.float32(moment - high) if np.isfinite(high) else np.float32(0)


@simd.parallel
def _combine(
    table: Any,
    moments: TypedPointer,
    offsets: TypedPointer,
    scale: TypedPointer,
    shift: TypedPointer,
    has_scale: bool,
    has_shift: bool,
    raw: bool,
    width: int,
) -> None:
    out, out_offsets, scales, shifts = simd.pointer(moments), simd.pointer(offsets), simd.pointer(scale), simd.pointer(shift)
    plane = len(table) * width
    for row in prange(len(table)):
        parts_at, center_at, channels, count = table[row]
        parts, centers = simd.pointer((parts_at, ONE)), simd.pointer((center_at, ONE))
        for c in range(width):
            index, center, offset, square = row * width + c, 0.0, 0.0, 0.0
            if c < channels:
                center = np.float64(centers[c])
                for part in range(c * count, (c + 1) * count):
                    offset += np.float64(parts[part])
                    square += np.float64(parts[channels * count + part])
                if not count:  # the tensor is empty
                    offset = np.nan
            out_offsets[index] = np.float32(offset)
            mean, spread = center + offset, square - offset * offset
            if raw:
                spread = square if np.isinf(square) else square + center * (2 * offset + center)
            elif spread < 0:
                spread = 0.0
            if has_scale:
                mean, spread = mean * scales[index], spread * scales[plane + index]
            if has_shift:
                mean, spread = mean + shifts[index], spread + shifts[plane + index]
            out[index], out[plane + index] = mean, spread if count or c >= channels else np.nan


@simd.inline
def _period(channels: int) -> int:
    """Return the number of channels-last elements processed at once: whole pixels, enough to fill the SIMD vectors."""
    return -(-64 // channels) * channels


@simd.parallel
def _gradient_planes(
    x: TypedPointer,
    gradient: TypedPointer,
    grad_mean: TypedPointer,
    grad_variance: TypedPointer,
    center: TypedPointer,
    scale: np.float32,
    count: int,
    channels: int,
    pixels: int,
) -> None:
    source, out = simd.pointer(x), simd.pointer(gradient)
    offsets, slopes, centers = simd.pointer(grad_mean), simd.pointer(grad_variance), simd.pointer(center)
    for plane in prange(count * channels):
        a, b, c = scale * offsets[plane % channels], (scale + scale) * slopes[plane % channels], centers[plane % channels]
        for i in range(plane * pixels, (plane + 1) * pixels):
            out[i] = simd.narrow(a + b * (simd.widen(source[i]) - c), gradient)


@simd.parallel
def _gradient_rows(
    x: TypedPointer,
    gradient: TypedPointer,
    grad_mean: TypedPointer,
    grad_variance: TypedPointer,
    center: TypedPointer,
    scale: np.float32,
    count: int,
    channels: int,
    pixels: int,
) -> None:
    source, out = simd.pointer(x), simd.pointer(gradient)
    offsets, slopes, centers = simd.pointer(grad_mean), simd.pointer(grad_variance), simd.pointer(center)
    size, period = count * pixels * channels, _period(channels)
    a, b, c = np.empty(period, np.float32), np.empty(period, np.float32), np.empty(period, np.float32)
    for i in range(period):
        a[i], b[i], c[i] = scale * offsets[i % channels], (scale + scale) * slopes[i % channels], centers[i % channels]
    for group in prange(-(-size // period)):
        start = group * period
        for i in range(min(period, size - start)):
            out[start + i] = simd.narrow(a[i] + b[i] * (simd.widen(source[start + i]) - c[i]), gradient)
