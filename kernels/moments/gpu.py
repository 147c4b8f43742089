"""The moments in Triton: one read of the activations, partial sums a program, combined in order by a second kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import activate, launch, layout, offsets, place, programs, splits, store, tile

BLOCK = 2048  # elements of a tile


def moments_forward(x: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See kernels/moments."""
    channels = x.shape[1]
    sizes, (strides,) = layout(x)
    block_rows, block_channels = tile(sizes, strides, BLOCK)
    parts = splits(sizes, block_rows, block_channels)
    partials = x.new_empty((2, parts, channels), dtype=torch.float64)
    total, square, mean, variance = (
        x.new_empty(channels, dtype=dtype) for dtype in (torch.float64, torch.float64, torch.float32, torch.float32)
    )
    grid = parts, triton.cdiv(channels, block_channels)
    launch(x, _partials_kernel, grid, x, partials, sizes, strides, activation, block_rows, block_channels)
    results = total, square, mean, variance
    count = x.numel() // max(channels, 1)
    arguments = x if parts else None, partials, *results, parts, count, channels, strides[3], activation
    launch(x, _combine_kernel, (triton.cdiv(channels, 16),), *arguments, 64, 16)
    return results


def moments_backward(x: Tensor, offset: Tensor, slope: Tensor, center: Tensor) -> Tensor:
    """See kernels/moments."""
    gradient = torch.empty_like(x)
    sizes, strides = layout(x, gradient)
    block_rows, block_channels = tile(sizes, strides[0], BLOCK)
    grid = programs(sizes, block_rows), triton.cdiv(sizes[3], block_channels)
    launch(x, _backward_kernel, grid, x, gradient, offset, slope, center, sizes, *strides, block_rows, block_channels)
    return gradient


@triton.jit
def _pivot(x: tl.tensor, channels: tl.tensor, mask: tl.tensor, stride: tl.tensor, activation: tl.constexpr) -> tl.tensor:
    """The first value of every channel: near the mean, as sums of squares about it must be not to cancel."""
    first = activate(tl.load(x + channels.to(tl.int64) * stride, mask=mask, other=0).to(tl.float32), activation)
    return tl.where(tl.abs(first) < float("inf"), first, 0)


@triton.jit
def _partials_kernel(
    x: tl.tensor,
    partials: tl.tensor,
    sizes: tl.tuple,
    strides: tl.tuple,
    activation: tl.constexpr,
    block_rows: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    part = tl.program_id(0)
    parts = tl.num_programs(0)
    channels = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    pivot = _pivot(x, channels, channels < sizes[3], strides[3], activation)
    total = tl.zeros((block_rows, block_channels), tl.float32)
    square = total
    for index in range(part, sizes[0] * sizes[1] * tl.cdiv(sizes[2], block_rows), parts):
        group, rows = place(index, sizes, block_rows)
        mask = (rows < sizes[2])[:, None] & (channels < sizes[3])[None, :]
        y = tl.load(x + offsets(group, rows, channels, sizes, strides), mask=mask, other=0).to(tl.float32)
        centred = tl.where(mask, activate(y, activation) - pivot[None, :], 0)
        total += centred
        square += centred * centred
    to = partials + part * sizes[3] + channels
    tl.store(to, tl.sum(total.to(tl.float64), axis=0), mask=channels < sizes[3])
    tl.store(to + parts * sizes[3], tl.sum(square.to(tl.float64), axis=0), mask=channels < sizes[3])


@triton.jit(do_not_specialize=["parts", "count"])
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
    total = tl.zeros((block_parts, block_channels), tl.float64)
    square = total
    for start in range(0, parts, block_parts):
        part = start + tl.arange(0, block_parts)
        mask = (part < parts)[:, None] & real[None, :]
        of = partials + part[:, None] * channel_count + channels[None, :]
        total += tl.load(of, mask=mask, other=0)
        square += tl.load(of + parts * channel_count, mask=mask, other=0)
    total = tl.sum(total, axis=0)
    square = tl.sum(square, axis=0)
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


@triton.jit
def _backward_kernel(
    x: tl.tensor,
    gradient: tl.tensor,
    offset: tl.tensor,
    slope: tl.tensor,
    center: tl.tensor,
    sizes: tl.tuple,
    strides: tl.tuple,
    gradient_strides: tl.tuple,
    block_rows: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    group, rows = place(tl.program_id(0), sizes, block_rows)
    channels = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    real = channels < sizes[3]
    mask = (rows < sizes[2])[:, None] & real[None, :]
    values = tl.load(x + offsets(group, rows, channels, sizes, strides), mask=mask).to(tl.float32)
    centred = values - tl.load(center + channels, mask=real)[None, :]
    result = tl.load(offset + channels, mask=real)[None, :] + tl.load(slope + channels, mask=real)[None, :] * centred
    store(gradient + offsets(group, rows, channels, sizes, gradient_strides), result, mask)
