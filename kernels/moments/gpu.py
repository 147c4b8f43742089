"""Per-channel moments in Triton: one pass over the activations; a second kernel adds the partial sums in order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import (
    activate,
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


def moments_forward(x: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See kernels/moments."""
    channels = x.shape[1]
    sizes, (strides,) = layout(x)
    block_rows, block_channels = tile_shape(sizes, strides)
    parts = num_splits(sizes, block_rows, block_channels)
    partials = x.new_empty((2, parts, channels), dtype=torch.float64)
    total, square, mean, variance = (
        x.new_empty(channels, dtype=dtype) for dtype in (torch.float64, torch.float64, torch.float32, torch.float32)
    )
    grid = parts, triton.cdiv(channels, block_channels)
    launch(x, _partials_kernel, grid, x, partials, *layout_arguments(sizes, (x,), (strides,)), activation, block_rows, block_channels)
    results = total, square, mean, variance
    count = x.numel() // max(channels, 1)
    arguments = x if parts else None, partials, *results, parts, count, channels, strides[3], activation
    launch(x, _combine_kernel, (triton.cdiv(channels, 16),), *arguments, 64, 16)
    return results


def moments_backward(x: Tensor, grad_mean: Tensor, grad_variance: Tensor, center: Tensor, scale: float) -> Tensor:
    """See kernels/moments."""
    gradient = torch.empty_like(x)
    launch_tiles(_backward_kernel, (x, gradient), grad_mean, grad_variance, center, float(scale))
    return gradient


@triton.jit
def _pivot(x: tl.tensor, channels: tl.tensor, mask: tl.tensor, stride: tl.tensor, activation: tl.constexpr) -> tl.tensor:
    """Return the first value of each channel, the shift of the sums: unshifted sums of squares would cancel."""
    first = activate(tl.load(x + channels.to(tl.int64) * stride, mask=mask, other=0).to(tl.float32), activation)
    return tl.where(tl.abs(first) < float("inf"), first, 0)


@triton.jit(do_not_specialize=["x"])
def _partials_kernel(
    x: tl.tensor,
    partials: tl.tensor,
    sizes: tl.tuple,
    strides: tl.tuple,
    accesses: tl.constexpr,
    activation: tl.constexpr,
    block_rows: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    sizes = decode_sizes(sizes, accesses)
    part = tl.program_id(0)
    parts = tl.num_programs(0)
    channels = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    channel_mask = channels < sizes[3]
    pivot = _pivot(x, channels, channel_mask, strides[3] // -2, activation)
    total = tl.zeros((block_rows, block_channels), tl.float32)
    square = total
    for index in range(part, sizes[0] * sizes[1] * tl.cdiv(sizes[2], block_rows), parts):
        group, rows = tile_rows(index, sizes, block_rows)
        mask = (rows < sizes[2])[:, None] & channel_mask[None, :]
        y = load(pointers(x, group, rows, channels, sizes, strides, accesses, 0), mask)
        centered = tl.where(mask, activate(y, activation) - pivot[None, :], 0)
        total += centered
        square += centered * centered
    destination = partials + part * sizes[3] + channels
    tl.store(destination, tl.sum(total.to(tl.float64), axis=0), mask=channel_mask)
    tl.store(destination + parts * sizes[3], tl.sum(square.to(tl.float64), axis=0), mask=channel_mask)


@triton.jit(do_not_specialize=["x", "parts", "count", "channel_count", "stride"])
def _combine_kernel(
    x: tl.tensor,
    partials: tl.tensor,
    totals: tl.tensor,
    squares: tl.tensor,
    means: tl.tensor,
    variances: tl.tensor,
    parts: tl.tensor,
    count: tl.tensor,
    channel_count: tl.tensor,
    stride: tl.tensor,
    activation: tl.constexpr,
    block_parts: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    channels = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    channel_mask = channels < channel_count
    total, square = combine_partials(partials, parts, channels, channel_count, block_parts)
    n = count.to(tl.float64)
    pivot = tl.zeros((block_channels,), tl.float64)
    if x is not None:
        pivot = _pivot(x, channels, channel_mask, stride, activation).to(tl.float64)
    mean = total / n
    variance = square / n - mean * mean
    # If the shifted sum of squares is infinite, so is the unshifted one; the formula would give ∞ − ∞.
    plain = square + 2 * pivot * total + n * pivot * pivot
    tl.store(totals + channels, total + n * pivot, mask=channel_mask)
    tl.store(squares + channels, tl.where(square < float("inf"), plain, square), mask=channel_mask)
    tl.store(means + channels, (pivot + mean).to(tl.float32), mask=channel_mask)
    tl.store(variances + channels, tl.where(variance < 0, 0, variance).to(tl.float32), mask=channel_mask)


@triton.jit(do_not_specialize=["x", "gradient"])
def _backward_kernel(
    x: tl.tensor,
    gradient: tl.tensor,
    grad_mean: tl.tensor,
    grad_variance: tl.tensor,
    center: tl.tensor,
    scale: float,
    sizes: tl.tuple,
    strides: tl.tuple,
    gradient_strides: tl.tuple,
    accesses: tl.constexpr,
    block_rows: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    sizes, group, rows, channels, mask = program_tile(sizes, accesses, block_rows, block_channels)
    channel_mask = channels < sizes[3]
    values = load(pointers(x, group, rows, channels, sizes, strides, accesses, 0), mask)
    centered = values - tl.load(center + channels, mask=channel_mask)[None, :]
    offset, slope = tl.load(grad_mean + channels, mask=channel_mask), tl.load(grad_variance + channels, mask=channel_mask)
    result = (scale * offset)[None, :] + (2 * scale * slope)[None, :] * centered
    store(pointers(gradient, group, rows, channels, sizes, gradient_strides, accesses, 1), result, mask)
