"""Concatenation of generated images in Triton: one launch per generator, which writes its rows of the batch."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import (
    Sizes,
    activate,
    activation_slope,
    combine_partials,
    decode_sizes,
    launch,
    layout,
    layout_arguments,
    num_splits,
    num_tiles,
    pointers,
    store,
    tile_rows,
    tile_shape,
    unspecialized,
)


def concat_forward(
    raws: Sequence[Tensor], activation: str, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    """See kernels/concat."""
    shape = sum(len(raw) for raw in raws), *raws[0].shape[1:]
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(shape, dtype=dtype, device=raws[0].device, memory_format=memory_format)
    concat_forward_out(out, raws, activation, mean, std)
    return out


def concat_forward_out(out: Tensor, raws: Sequence[Tensor], activation: str, mean: Tensor | None, std: Tensor | None) -> None:
    """See kernels/concat."""
    start = 0
    for index, raw in enumerate(raws):
        part = out[start : start + len(raw)]
        start += len(raw)
        sizes, strides = layout(raw, part)
        block_rows, block_channels = tile_shape(sizes, strides[0])
        constants = _constants(None if mean is None else mean[index], None if std is None else std[index])
        grid = _grid(sizes, block_rows, block_channels)
        arguments = raw, part, *constants, *layout_arguments(sizes, (raw, part), strides), activation
        launch(raw, _forward_kernel, grid, *arguments, block_rows, block_channels)


def concat_backward(
    gradient: Tensor,
    raw: Tensor,
    activation: str,
    mean: Tensor | None,
    std: Tensor | None,
    gradient_mean: Tensor | None,
    gradient_dot: Tensor | None,
) -> Tensor:
    """See kernels/concat."""
    result = torch.empty_like(raw)
    sizes, strides = layout(gradient, raw, result)
    block_rows, block_channels = tile_shape(sizes, strides[1])
    constants = _constants(mean, std, gradient_mean, gradient_dot)
    grid = _grid(sizes, block_rows, block_channels)
    arguments = gradient, raw, result, *constants, *layout_arguments(sizes, (gradient, raw, result), strides), activation
    launch(raw, _backward_kernel, grid, *arguments, block_rows, block_channels)
    return result


def concat_gradient_moments(gradient: Tensor, raw: Tensor, activation: str, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """See kernels/concat."""
    channels = raw.shape[1]
    sizes, strides = layout(gradient, raw)
    block_rows, block_channels = tile_shape(sizes, strides[1])
    parts = num_splits(sizes, block_rows, block_channels)
    partials = raw.new_empty((2, parts, channels), dtype=torch.float32)
    gradient_mean, gradient_dot = (raw.new_empty(channels, dtype=torch.float32) for _ in range(2))
    constants = _constants(mean, std)
    grid = parts, triton.cdiv(channels, block_channels)
    arguments = gradient, raw, partials, *constants, *layout_arguments(sizes, (gradient, raw), strides), activation
    launch(raw, _partials_kernel, grid, *arguments, block_rows, block_channels)
    count = raw.numel() // max(channels, 1)
    launch(raw, _combine_kernel, (triton.cdiv(channels, 16),), partials, gradient_mean, gradient_dot, parts, count, channels, 64, 16)
    return gradient_mean, gradient_dot


def _constants(*constants: Tensor | None) -> tuple[Tensor | tuple[int, ...] | None, ...]:
    """Return the per-channel constants (C,) and their unspecialized strides."""
    return *constants, unspecialized([0 if constant is None else constant.stride(0) for constant in constants])


def _grid(sizes: Sizes, block_rows: int, block_channels: int) -> tuple[int, int]:
    return num_tiles(sizes, block_rows), triton.cdiv(sizes[3], block_channels)


@triton.jit(do_not_specialize=["raw", "out", "mean", "std"])
def _forward_kernel(
    raw: tl.tensor,
    out: tl.tensor,
    mean: tl.tensor,
    std: tl.tensor,
    constant_strides: tl.tuple,
    sizes: tl.tuple,
    strides: tl.tuple,
    out_strides: tl.tuple,
    accesses: tl.constexpr,
    activation: tl.constexpr,
    block_rows: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    sizes = decode_sizes(sizes, accesses)
    group, rows = tile_rows(tl.program_id(0), sizes, block_rows)
    channels = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    mask = (rows < sizes[2])[:, None] & (channels < sizes[3])[None, :]
    x = tl.load(pointers(raw, group, rows, channels, sizes, strides, accesses, 0), mask=mask, other=0).to(tl.float32)
    image = activate(x, activation)
    if mean is not None:
        image -= _constant(mean, channels, constant_strides[0], sizes)
    if std is not None:
        image *= 1 / _constant(std, channels, constant_strides[1], sizes)
    store(pointers(out, group, rows, channels, sizes, out_strides, accesses, 1), image, mask)


@triton.jit(do_not_specialize=["gradient", "raw", "result", "mean", "std", "gradient_mean", "gradient_dot"])
def _backward_kernel(
    gradient: tl.tensor,
    raw: tl.tensor,
    result: tl.tensor,
    mean: tl.tensor,
    std: tl.tensor,
    gradient_mean: tl.tensor,
    gradient_dot: tl.tensor,
    constant_strides: tl.tuple,
    sizes: tl.tuple,
    gradient_strides: tl.tuple,
    strides: tl.tuple,
    result_strides: tl.tuple,
    accesses: tl.constexpr,
    activation: tl.constexpr,
    block_rows: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    sizes = decode_sizes(sizes, accesses)
    group, rows = tile_rows(tl.program_id(0), sizes, block_rows)
    channels = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    mask = (rows < sizes[2])[:, None] & (channels < sizes[3])[None, :]
    g = tl.load(pointers(gradient, group, rows, channels, sizes, gradient_strides, accesses, 0), mask=mask, other=0).to(tl.float32)
    x = tl.load(pointers(raw, group, rows, channels, sizes, strides, accesses, 1), mask=mask, other=0).to(tl.float32)
    y = activate(x, activation)
    if std is not None:
        inverse = 1 / _constant(std, channels, constant_strides[1], sizes)
        if gradient_mean is not None:
            x_hat = (y - _constant(mean, channels, constant_strides[0], sizes)) * inverse
            g -= _constant(gradient_mean, channels, constant_strides[2], sizes)
            g -= x_hat * _constant(gradient_dot, channels, constant_strides[3], sizes)
        g *= inverse
    store(pointers(result, group, rows, channels, sizes, result_strides, accesses, 2), g * activation_slope(y, activation), mask)


@triton.jit(do_not_specialize=["gradient", "raw", "mean", "std"])
def _partials_kernel(
    gradient: tl.tensor,
    raw: tl.tensor,
    partials: tl.tensor,
    mean: tl.tensor,
    std: tl.tensor,
    constant_strides: tl.tuple,
    sizes: tl.tuple,
    gradient_strides: tl.tuple,
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
    center = _constant(mean, channels, constant_strides[0], sizes)
    inverse = 1 / _constant(std, channels, constant_strides[1], sizes)
    total = tl.zeros((block_rows, block_channels), tl.float32)
    dot = total
    for index in range(part, sizes[0] * sizes[1] * tl.cdiv(sizes[2], block_rows), parts):
        group, rows = tile_rows(index, sizes, block_rows)
        mask = (rows < sizes[2])[:, None] & (channels < sizes[3])[None, :]
        g = tl.load(pointers(gradient, group, rows, channels, sizes, gradient_strides, accesses, 0), mask=mask, other=0).to(tl.float32)
        x = tl.load(pointers(raw, group, rows, channels, sizes, strides, accesses, 1), mask=mask, other=0).to(tl.float32)
        total += g
        dot += tl.where(mask, g * ((activate(x, activation) - center) * inverse), 0)
    destination = partials + part * sizes[3] + channels
    tl.store(destination, tl.sum(total, axis=0), mask=channels < sizes[3])
    tl.store(destination + parts * sizes[3], tl.sum(dot, axis=0), mask=channels < sizes[3])


@triton.jit(do_not_specialize=["parts", "count", "channel_count"])
def _combine_kernel(
    partials: tl.tensor,
    means: tl.tensor,
    dots: tl.tensor,
    parts: tl.tensor,
    count: tl.tensor,
    channel_count: tl.tensor,
    block_parts: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    channels = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    total, dot = combine_partials(partials, parts, channels, channel_count, block_parts)
    n = count.to(tl.float64)
    tl.store(means + channels, (total / n).to(tl.float32), mask=channels < channel_count)
    tl.store(dots + channels, (dot / n).to(tl.float32), mask=channels < channel_count)


@triton.jit
def _constant(values: tl.tensor, channels: tl.tensor, stride: tl.tensor, sizes: tl.tuple) -> tl.tensor:
    """Load a per-channel constant, broadcast over rows; 1 beyond the last channel."""
    return tl.load(values + channels.to(tl.int64) * (stride // -2), mask=channels < sizes[3], other=1)[None, :]
