"""The normalisation and its gradient on a CPU, in numba, over channels-last tensors.

Whatever batch normalisation does to a channel once its moments are known is x · scale + shift.
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
    """The inverse of each channel's standard deviation, and the scale and shift that normalise it; (C,) each, like the arguments."""
    inverse = (variance + eps).rsqrt()
    scale = weight * inverse
    return inverse, scale, bias - mean * scale


def forward(x: Tensor, scale: Tensor, shift: Tensor, slope: float) -> Tensor:
    """``leaky_relu(x · scale + shift)``, a scale and a shift a channel."""
    y = torch.empty_like(x)
    with simd.threads:
        _forward(*map(simd.typed_pointer, (x, y, scale, shift)), np.float32(slope), x.numel(), x.shape[1])
    return y


def backward_constants(
    gradient: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, scale: Tensor, shift: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of weight and bias, and ``x_coefficient`` and ``offset`` for ``backward``; (C,) each.

    With g the gradient before the leaky ReLU and x̂ = (x − mean) · inverse, they are Σ g · x̂ and Σ g, and the gradient of x is
    scale · (g − Σ g / count − x̂ · Σ g · x̂ / count), of which the last two are x · x_coefficient + offset.
    """
    sums = torch.empty(2, x.shape[1])
    with simd.threads:
        _backward_sums(*map(simd.typed_pointer, (gradient, x, mean, scale, shift, sums)), np.float32(slope), x.numel(), x.shape[1])
    grad_bias, centred = sums
    grad_weight = inverse * centred
    count = x.numel() // x.shape[1]
    x_coefficient = -scale * inverse * grad_weight / count
    return grad_weight, grad_bias, x_coefficient, -scale * grad_bias / count - x_coefficient * mean


def backward(gradient: Tensor, x: Tensor, scale: Tensor, shift: Tensor, x_coefficient: Tensor, offset: Tensor, slope: float) -> Tensor:
    """g · scale + x · x_coefficient + offset, g being the gradient before the leaky ReLU."""
    result = torch.empty_like(x)
    with simd.threads:
        _backward(
            *map(simd.typed_pointer, (gradient, x, result, scale, shift, x_coefficient, offset)), np.float32(slope), x.numel(), x.shape[1]
        )
    return result


@simd.helper
def _repeated(values: TypedPointer, channels: int) -> Any:
    """A value a channel, as often as fills the vectors."""
    given = simd.pointer(values)
    result = np.empty(-(-64 // channels) * channels, np.float32)
    for i in range(len(result)):
        result[i] = given[i % channels]
    return result


@simd.parallel
def _forward(x: TypedPointer, y: TypedPointer, scale: TypedPointer, shift: TypedPointer, slope: float, size: int, channels: int) -> None:
    given, out = simd.pointer(x), simd.pointer(y)
    a, b = _repeated(scale, channels), _repeated(shift, channels)
    period = len(a)
    for group in prange(-(-size // period)):
        start = group * period
        for i in range(min(period, size - start)):
            value = simd.widen(given[start + i]) * a[i] + b[i]
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
    incoming, given, out = simd.pointer(gradient), simd.pointer(x), simd.pointer(sums)
    center, a, b = _repeated(mean, channels), _repeated(scale, channels), _repeated(shift, channels)
    period = len(a)
    block = max(1, simd.BLOCK // period) * period
    partial = np.zeros((-(-size // block), 2, channels))
    for part in prange(len(partial)):
        total, centred = np.zeros(period, np.float32), np.zeros(period, np.float32)
        for start in range(part * block, min((part + 1) * block, size), period):
            for i in range(min(period, size - start)):
                value = simd.widen(given[start + i])
                g = simd.widen(incoming[start + i])
                g = g if value * a[i] + b[i] > simd.ZERO else g * slope
                total[i] += g
                centred[i] += g * (value - center[i])
        for i in range(period):
            partial[part, 0, i % channels] += total[i]
            partial[part, 1, i % channels] += centred[i]
    for channel in range(channels):
        total_, centred_ = 0.0, 0.0
        for part in range(len(partial)):
            total_ += partial[part, 0, channel]
            centred_ += partial[part, 1, channel]
        out[channel], out[channels + channel] = np.float32(total_), np.float32(centred_)


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
    incoming, given, out = simd.pointer(gradient), simd.pointer(x), simd.pointer(result)
    a, b, c, d = _repeated(scale, channels), _repeated(shift, channels), _repeated(x_coefficient, channels), _repeated(offset, channels)
    period = len(a)
    for group in prange(-(-size // period)):
        start = group * period
        for i in range(min(period, size - start)):
            value = simd.widen(given[start + i])
            g = simd.widen(incoming[start + i])
            g = g if value * a[i] + b[i] > simd.ZERO else g * slope
            out[start + i] = simd.narrow(g * a[i] + value * c[i] + d[i], result)
