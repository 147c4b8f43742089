"""Batch normalization with leaky ReLU in Triton, for tensors of any strides; see kernels/norm/cpu.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import (
    combine_partials,
    decode_sizes,
    launch,
    launch_tiles,
    layout,
    layout_arguments,
    load,
    num_splits,
    pointers,
    program_tile,
    store,
    tile_rows,
    tile_shape,
)

__all__ = ["backward", "backward_constants", "constants", "forward"]


def constants(mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """See kernels/norm/cpu.py; one launch."""
    channels = len(mean)
    inverse, scale, shift = (mean.new_empty(channels) for _ in range(3))
    inputs = [tensor.resolve_neg().contiguous() for tensor in (mean, variance, weight, bias)]
    launch(mean, _constants_kernel, (triton.cdiv(channels, 256),), *inputs, inverse, scale, shift, float(eps), channels, 256)
    return inverse, scale, shift


def forward(x: Tensor, scale: Tensor, shift: Tensor, slope: float) -> Tensor:
    """See kernels/norm/cpu.py."""
    y = torch.empty_like(x)
    launch_tiles(_forward_kernel, (x, y), scale, shift, float(slope))
    return y


def backward_constants(
    gradient: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, scale: Tensor, shift: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See kernels/norm/cpu.py; a second kernel adds the partial sums in order."""
    channels = x.shape[1]
    sizes, strides = layout(gradient, x)
    block_rows, block_channels = tile_shape(sizes, strides[1])
    parts = num_splits(sizes, block_rows, block_channels)
    partials = x.new_empty((2, parts, channels), dtype=torch.float32)
    grid = parts, triton.cdiv(channels, block_channels)
    arguments = gradient, x, mean, scale, shift, partials, float(slope), *layout_arguments(sizes, (gradient, x), strides)
    launch(x, _partials_kernel, grid, *arguments, block_rows, block_channels)
    grad_weight, grad_bias, x_coefficient, offset = results = tuple(mean.new_empty(channels) for _ in range(4))
    count = x.numel() // channels
    launch(x, _combine_kernel, (triton.cdiv(channels, 16),), partials, mean, inverse, scale, *results, parts, count, channels, 64, 16)
    return grad_weight, grad_bias, x_coefficient, offset


def backward(gradient: Tensor, x: Tensor, scale: Tensor, shift: Tensor, x_coefficient: Tensor, offset: Tensor, slope: float) -> Tensor:
    """See kernels/norm/cpu.py."""
    result = torch.empty_like(x)
    launch_tiles(_backward_kernel, (x, gradient, result), scale, shift, x_coefficient, offset, float(slope))
    return result


@triton.jit
def _constant(values: tl.tensor, channels: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Load a per-channel constant, broadcast over rows."""
    return tl.load(values + channels, mask=mask, other=0)[None, :]


@triton.jit
def _before_relu(gradient: tl.tensor, x: tl.tensor, scale: tl.tensor, shift: tl.tensor, slope: float) -> tl.tensor:
    """Return the gradient at the input of the leaky ReLU."""
    return tl.where(x * scale + shift > 0, gradient, gradient * slope)


@triton.jit(do_not_specialize=["mean", "variance", "weight", "bias", "channel_count"])
def _constants_kernel(
    mean: tl.tensor,
    variance: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    inverses: tl.tensor,
    scales: tl.tensor,
    shifts: tl.tensor,
    eps: float,
    channel_count: tl.tensor,
    block_channels: tl.constexpr,
) -> None:
    channels = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    channel_mask = channels < channel_count
    inverse = 1 / tl.sqrt(tl.load(variance + channels, mask=channel_mask, other=1) + eps)
    scale = tl.load(weight + channels, mask=channel_mask, other=0) * inverse
    shift = tl.load(bias + channels, mask=channel_mask, other=0) - tl.load(mean + channels, mask=channel_mask, other=0) * scale
    tl.store(inverses + channels, inverse, mask=channel_mask)
    tl.store(scales + channels, scale, mask=channel_mask)
    tl.store(shifts + channels, shift, mask=channel_mask)


@triton.jit(do_not_specialize=["x", "y"])
def _forward_kernel(
    x: tl.tensor,
    y: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    slope: float,
    sizes: tl.tuple,
    strides: tl.tuple,
    y_strides: tl.tuple,
    accesses: tl.constexpr,
    block_rows: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    sizes, group, rows, channels, mask = program_tile(sizes, accesses, block_rows, block_channels)
    channel_mask = channels < sizes[3]
    values = load(pointers(x, group, rows, channels, sizes, strides, accesses, 0), mask)
    values = values * _constant(scale, channels, channel_mask) + _constant(shift, channels, channel_mask)
    values = tl.where(values > 0, values, values * slope)
    store(pointers(y, group, rows, channels, sizes, y_strides, accesses, 1), values, mask)


@triton.jit(do_not_specialize=["gradient", "x"])
def _partials_kernel(
    gradient: tl.tensor,
    x: tl.tensor,
    mean: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    partials: tl.tensor,
    slope: float,
    sizes: tl.tuple,
    gradient_strides: tl.tuple,
    strides: tl.tuple,
    accesses: tl.constexpr,
    block_rows: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    sizes = decode_sizes(sizes, accesses)
    part = tl.program_id(0)
    parts = tl.num_programs(0)
    channels = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    channel_mask = channels < sizes[3]
    center, a, b = (
        _constant(mean, channels, channel_mask),
        _constant(scale, channels, channel_mask),
        _constant(shift, channels, channel_mask),
    )
    total = tl.zeros((block_rows, block_channels), tl.float32)
    centered = total
    for index in range(part, sizes[0] * sizes[1] * tl.cdiv(sizes[2], block_rows), parts):
        group, rows = tile_rows(index, sizes, block_rows)
        mask = (rows < sizes[2])[:, None] & channel_mask[None, :]
        g = load(pointers(gradient, group, rows, channels, sizes, gradient_strides, accesses, 0), mask)
        values = load(pointers(x, group, rows, channels, sizes, strides, accesses, 1), mask)
        g = _before_relu(g, values, a, b, slope)
        total += g
        centered += tl.where(mask, g * (values - center), 0)
    destination = partials + part * sizes[3] + channels
    tl.store(destination, tl.sum(total, axis=0), mask=channel_mask)
    tl.store(destination + parts * sizes[3], tl.sum(centered, axis=0), mask=channel_mask)


@triton.jit(do_not_specialize=["parts", "count", "channel_count"])
def _combine_kernel(
    partials: tl.tensor,
    means: tl.tensor,
    inverses: tl.tensor,
    scales: tl.tensor,
    grad_weight: tl.tensor,
    grad_bias: tl.tensor,
    x_coefficient: tl.tensor,
    offsets: tl.tensor,
    parts: tl.tensor,
    count: tl.tensor,
    channel_count: tl.tensor,
    block_parts: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    channels = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    channel_mask = channels < channel_count
    total, centered = combine_partials(partials, parts, channels, channel_count, block_parts)
    mean = tl.load(means + channels, mask=channel_mask, other=0).to(tl.float64)
    inverse = tl.load(inverses + channels, mask=channel_mask, other=0).to(tl.float64)
    scale = tl.load(scales + channels, mask=channel_mask, other=0).to(tl.float64)
    n = count.to(tl.float64)
    dot = centered * inverse
    slope = -scale * inverse * dot / n
    tl.store(grad_weight + channels, dot.to(tl.float32), mask=channel_mask)
    tl.store(grad_bias + channels, total.to(tl.float32), mask=channel_mask)
    tl.store(x_coefficient + channels, slope.to(tl.float32), mask=channel_mask)
    tl.store(offsets + channels, (-scale * total / n - slope * mean).to(tl.float32), mask=channel_mask)


@triton.jit(do_not_specialize=["x", "gradient", "result"])
def _backward_kernel(
    x: tl.tensor,
    gradient: tl.tensor,
    result: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    x_coefficient: tl.tensor,
    offset: tl.tensor,
    slope: float,
    sizes: tl.tuple,
    strides: tl.tuple,
    gradient_strides: tl.tuple,
    result_strides: tl.tuple,
    accesses: tl.constexpr,
    block_rows: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    sizes, group, rows, channels, mask = program_tile(sizes, accesses, block_rows, block_channels)
    channel_mask = channels < sizes[3]
    g = load(pointers(gradient, group, rows, channels, sizes, gradient_strides, accesses, 1), mask)
    values = load(pointers(x, group, rows, channels, sizes, strides, accesses, 0), mask)
    a = _constant(scale, channels, channel_mask)
    g = _before_relu(g, values, a, _constant(shift, channels, channel_mask), slope)
    values = g * a + values * _constant(x_coefficient, channels, channel_mask) + _constant(offset, channels, channel_mask)
    store(pointers(result, group, rows, channels, sizes, result_strides, accesses, 2), values, mask)
