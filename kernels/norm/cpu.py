"""Batch normalization with leaky ReLU in numba, for channels-last tensors.

Given its moments, batch normalization of a channel is x · scale + shift.
"""

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from .. import simd
from ..simd import TypedPointer

__all__ = ["backward", "backward_constants", "constants", "forward"]


def constants(mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the reciprocal standard deviation, and the scale and shift that normalize a channel; (C,) each, like the arguments."""
    inverse = (variance + eps).rsqrt()
    scale = weight * inverse
    return inverse, scale, bias - mean * scale


def forward(x: Tensor, scale: Tensor, shift: Tensor, slope: float) -> Tensor:
    """Return ``leaky_relu(x · scale + shift)`` with per-channel scale and shift."""
    y = torch.empty_like(x)
    with simd.threads:
        _forward(*map(simd.typed_pointer, (x, y, scale, shift)), np.float32(slope), x.numel(), x.shape[1])
    return y


def backward_constants(
    gradient: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, scale: Tensor, shift: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of weight and bias, and ``x_coefficient`` and ``offset`` for ``backward``; (C,) each.

    With g the gradient at the input of the leaky ReLU and x̂ = (x − mean) · inverse, the gradients are Σ g · x̂ and Σ g, and the
    gradient of x is scale · (g − Σ g / count − x̂ · Σ g · x̂ / count); its last two terms are x · x_coefficient + offset.
    """
    sums = torch.empty(2, x.shape[1])
    with simd.threads:
        _backward_sums(*map(simd.typed_pointer, (gradient, x, mean, scale, shift, sums)), np.float32(slope), x.numel(), x.shape[1])
    grad_bias, centered = sums
    grad_weight = inverse * centered
    count = x.numel() // x.shape[1]
    x_coefficient = -scale * inverse * grad_weight / count
    return grad_weight, grad_bias, x_coefficient, -scale * grad_bias / count - x_coefficient * mean


def backward(gradient: Tensor, x: Tensor, scale: Tensor, shift: Tensor, x_coefficient: Tensor, offset: Tensor, slope: float) -> Tensor:
    """Return g · scale + x · x_coefficient + offset, where g is the gradient at the input of the leaky ReLU."""
    result = torch.empty_like(x)
    with simd.threads:
        _backward(
            *map(simd.typed_pointer, (gradient, x, result, scale, shift, x_coefficient, offset)), np.float32(slope), x.numel(), x.shape[1]
        )
    return result


@simd.helper
def _repeat(values: TypedPointer, channels: int) -> Any:
    """Repeat per-channel values often enough to fill the SIMD vectors."""
    source = simd.pointer(values)
    result = np.empty(-(-64 // channels) * channels, np.float32)
    for i in range(len(result)):
        result[i] = source[i % channels]
    return result


@simd.parallel
def _forward(x: TypedPointer, y: TypedPointer, scale: TypedPointer, shift: TypedPointer, slope: float, size: int, channels: int) -> None:
    source, out = simd.pointer(x), simd.pointer(y)
    a, b = _repeat(scale, channels), _repeat(shift, channels)
    period = len(a)
    for group in prange(-(-size // period)):
        start = group * period
        for i in range(min(period, size - start)):
            value = simd.widen(source[start + i]) * a[i] + b[i]
            out[start + i] = simd.narrow(value if value > simd.ZERO else value * slope, y)


@simd.parallel
def _backward_sums(
    gradient: TypedPointer,
    x: TypedPointer,
    mean: TypedPointer,
    scale: TypedPointer,
    shift: TypedPointer,
    sums: TypedPointer,
    slope: float,
    size: int,
    channels: int,
) -> None:
    grad_data, source, out = simd.pointer(gradient), simd.pointer(x), simd.pointer(sums)
    center, a, b = _repeat(mean, channels), _repeat(scale, channels), _repeat(shift, channels)
    period = len(a)
    block = max(1, simd.BLOCK // period) * period
    partial = np.zeros((-(-size // block), 2, channels))
    for part in prange(len(partial)):
        total, centered = np.zeros(period, np.float32), np.zeros(period, np.float32)
        for start in range(part * block, min((part + 1) * block, size), period):
            for i in range(min(period, size - start)):
                value = simd.widen(source[start + i])
                g = simd.widen(grad_data[start + i])
                g = g if value * a[i] + b[i] > simd.ZERO else g * slope
                total[i] += g
                centered[i] += g * (value - center[i])
        for i in range(period):
            partial[part, 0, i % channels] += total[i]
            partial[part, 1, i % channels] += centered[i]
    for channel in range(channels):
        total_, centered_ = 0.0, 0.0
        for part in range(len(partial)):
            total_ += partial[part, 0, channel]
            centered_ += partial[part, 1, channel]
        out[channel], out[channels + channel] = np.float32(total_), np.float32(centered_)


@simd.parallel
def _backward(
    gradient: TypedPointer,
    x: TypedPointer,
    result: TypedPointer,
    scale: TypedPointer,
    shift: TypedPointer,
    x_coefficient: TypedPointer,
    offset: TypedPointer,
    slope: float,
    size: int,
    channels: int,
) -> None:
    grad_data, source, out = simd.pointer(gradient), simd.pointer(x), simd.pointer(result)
    a, b = _repeat(scale, channels), _repeat(shift, channels)
    c, d = _repeat(x_coefficient, channels), _repeat(offset, channels)
    period = len(a)
    for group in prange(-(-size // period)):
        start = group * period
        for i in range(min(period, size - start)):
            value = simd.widen(source[start + i])
            g = simd.widen(grad_data[start + i])
            g = g if value * a[i] + b[i] > simd.ZERO else g * slope
            out[start + i] = simd.narrow(g * a[i] + value * c[i] + d[i], result)
