"""The moments in Triton: one read of the activations, partial sums a program, combined in order by a second kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import (
    activate,
    combined,
    launch,
    launch_tiles,
    layout,
    load,
    packed,
    pointers,
    program_tile,
    revealed,
    splits,
    store,
    tile,
    tile_rows,
)


def moments_forward(x: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See kernels/moments."""
    channels = x.shape[1]
    sizes, (strides,) = layout(x)
    block_rows, block_channels = tile(sizes, strides)
    parts = splits(sizes, block_rows, block_channels)
    partials = x.new_empty((2, parts, channels), dtype=torch.float64)
    total, square, mean, variance = (
        x.new_empty(channels, dtype=dtype) for dtype in (torch.float64, torch.float64, torch.float32, torch.float32)
    )
    grid = parts, triton.cdiv(channels, block_channels)
    launch(x, _partials_kernel, grid, x, partials, *packed(sizes, (x,), (strides,)), activation, block_rows, block_channels)
    results = total, square, mean, variance
    count = x.numel() // max(channels, 1)
    arguments = x if parts else None, partials, *results, parts, count, channels, strides[3], activation
    launch(x, _combine_kernel, (triton.cdiv(channels, 16),), *arguments, 64, 16)
    return results


def moments_backward(x: Tensor, offset: Tensor, slope: Tensor, center: Tensor) -> Tensor:
    """See kernels/moments."""
    gradient = torch.empty_like(x)
    launch_tiles(_backward_kernel, (x, gradient), offset, slope, center)
    return gradient


@triton.jit
def _pivot(x: tl.tensor, channels: tl.tensor, mask: tl.tensor, stride: tl.tensor, activation: tl.constexpr) -> tl.tensor:
    """The first value of every channel: near the mean, as sums of squares about it must be not to cancel."""
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
    sizes = revealed(sizes, accesses)
    part = tl.program_id(0)
    parts = tl.num_programs(0)
    channels = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    real = channels < sizes[3]
    pivot = _pivot(x, channels, real, strides[3] // -2, activation)
    total = tl.zeros((block_rows, block_channels), tl.float32)
    square = total
    for index in range(part, sizes[0] * sizes[1] * tl.cdiv(sizes[2], block_rows), parts):
        group, rows = tile_rows(index, sizes, block_rows)
        mask = (rows < sizes[2])[:, None] & real[None, :]
        y = load(pointers(x, group, rows, channels, sizes, strides, accesses, 0), mask)
        centred = tl.where(mask, activate(y, activation) - pivot[None, :], 0)
        total += centred
        square += centred * centred
    to = partials + part * sizes[3] + channels
    tl.store(to, tl.sum(total.to(tl.float64), axis=0), mask=real)
    tl.store(to + parts * sizes[3], tl.sum(square.to(tl.float64), axis=0), mask=real)


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
    real = channels < channel_count
    total, square = combined(partials, parts, channels, channel_count, block_parts)
    n = count.to(tl.float64)
    pivot = tl.zeros((block_channels,), tl.float64)
    if x is not None:
        pivot = _pivot(x, channels, real, stride, activation).to(tl.float64)
    mean = total / n
    variance = square / n - mean * mean
    # An infinite sum of squares is one of the plain squares, where the formula would give ∞ − ∞.
    plain = square + 2 * pivot * total + n * pivot * pivot
    tl.store(totals + channels, total + n * pivot, mask=real)
    tl.store(squares + channels, tl.where(square < float("inf"), plain, square), mask=real)
    tl.store(means + channels, (pivot + mean).to(tl.float32), mask=real)
    tl.store(variances + channels, tl.where(variance < 0, 0, variance).to(tl.float32), mask=real)


@triton.jit(do_not_specialize=["x", "gradient"])
def _backward_kernel(
    x: tl.tensor,
    gradient: tl.tensor,
    offset: tl.tensor,
    slope: tl.tensor,
    center: tl.tensor,
    sizes: tl.tuple,
    strides: tl.tuple,
    gradient_strides: tl.tuple,
    accesses: tl.constexpr,
    block_rows: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    sizes, group, rows, channels, mask = program_tile(sizes, accesses, block_rows, block_channels)
    real = channels < sizes[3]
    values = load(pointers(x, group, rows, channels, sizes, strides, accesses, 0), mask)
    centred = values - tl.load(center + channels, mask=real)[None, :]
    result = tl.load(offset + channels, mask=real)[None, :] + tl.load(slope + channels, mask=real)[None, :] * centred
    store(pointers(gradient, group, rows, channels, sizes, gradient_strides, accesses, 1), result, mask)
