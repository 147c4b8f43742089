"""Per-channel moments in Triton: one pass over the activations; for all layers together, a second kernel adds the parts in order."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import (
    activate,
    decode_sizes,
    launch,
    launch_tiles,
    layout,
    layout_arguments,
    load,
    pointers,
    program_tile,
    store,
    tile_rows,
    tile_shape,
    unspecialized,
)

MAX_LAYERS = 64  # layers per launch; addresses are passed as kernel arguments, so that a CUDA graph can capture them


def partial_moments(x: Tensor, activation: str, blocks: int) -> tuple[Tensor, Tensor]:
    """See kernels/moments."""
    channels = x.shape[1]
    sizes, (strides,) = layout(x)
    block_rows, block_channels = tile_shape(sizes, strides)
    sums, center = x.new_empty((2, channels, 2 * blocks), dtype=torch.float32), x.new_empty(channels, dtype=torch.float32)
    arguments = x, sums, center, *layout_arguments(sizes, (x,), (strides,)), activation
    launch(x, _partial_kernel, (blocks, triton.cdiv(channels, block_channels)), *arguments, block_rows, block_channels)
    return sums, center


def combine_moments(
    parts: Sequence[Tensor], centers: Sequence[Tensor], scale: Tensor | None, shift: Tensor | None, raw: bool
) -> tuple[Tensor, Tensor]:
    """See kernels/moments."""
    shape = len(centers), max(map(len, centers))
    moments = centers[0].new_empty((2, *shape), dtype=torch.float64 if raw else torch.float32)
    offsets = centers[0].new_empty(shape)
    parts, centers = [part.contiguous() for part in parts], [center.contiguous() for center in centers]
    for start in range(0, shape[0], MAX_LAYERS):
        layers = list(range(start, min(start + MAX_LAYERS, shape[0])))
        grid = triton.cdiv(shape[1], 4), len(layers)
        if len(layers) > 1:  # the kernel is compiled for 1 and for MAX_LAYERS layers; unused ones are not read
            layers += [layers[-1]] * (MAX_LAYERS - len(layers))
        launch(
            moments,
            _combine_kernel,
            grid,
            unspecialized([parts[layer].data_ptr() for layer in layers]),
            unspecialized([centers[layer].data_ptr() for layer in layers]),
            unspecialized([len(centers[layer]) for layer in layers]),
            unspecialized([parts[layer].shape[2] for layer in layers]),
            moments,
            offsets,
            scale,
            shift,
            *unspecialized((start, *shape)),
            raw,
            256,
            4,
        )
    return moments, offsets


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
def _partial_kernel(
    x: tl.tensor,
    sums: tl.tensor,
    center: tl.tensor,
    sizes: tl.tuple,
    strides: tl.tuple,
    accesses: tl.constexpr,
    activation: tl.constexpr,
    block_rows: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    sizes = decode_sizes(sizes, accesses)
    channels = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    channel_mask = channels < sizes[3]
    pivot = _pivot(x, channels, channel_mask, strides[3] // -2, activation)
    total = tl.zeros((block_rows, block_channels), tl.float32)
    square = total
    for index in range(tl.program_id(0), sizes[0] * sizes[1] * tl.cdiv(sizes[2], block_rows), tl.num_programs(0)):
        group, rows = tile_rows(index, sizes, block_rows)
        mask = (rows < sizes[2])[:, None] & channel_mask[None, :]
        y = load(pointers(x, group, rows, channels, sizes, strides, accesses, 0), mask)
        centered = tl.where(mask, activate(y, activation) - pivot[None, :], 0)
        total += centered
        square += centered * centered
    store_parts(sums, center, pivot, total, square, channels, sizes)


@triton.jit
def store_parts(
    sums: tl.tensor,
    center: tl.tensor,
    pivot: tl.tensor,
    total: tl.tensor,
    square: tl.tensor,
    channels: tl.tensor,
    sizes: tl.tuple,
) -> None:
    """Store the sums of this program as parts (2, channels, 2 · programs) of the moments about the pivot, and the pivot as their center."""
    program = tl.program_id(0)
    parts = 2 * tl.num_programs(0)
    mask = channels < sizes[3]
    count = (sizes[0] * sizes[1]).to(tl.float64) * sizes[2]
    target = sums + channels.to(tl.int64) * parts + 2 * program
    store_split(target, tl.sum(total.to(tl.float64), axis=0) / count, mask)
    store_split(target + sizes[3].to(tl.int64) * parts, tl.sum(square.to(tl.float64), axis=0) / count, mask)
    if program == 0:
        tl.store(center + channels, pivot, mask=mask)


@triton.jit
def store_split(target: tl.tensor, values: tl.tensor, mask: tl.tensor) -> None:
    """Store float64 numbers as sums of two float32 numbers."""
    high = values.to(tl.float32)
    low = tl.where(tl.abs(high) < float("inf"), values - high.to(tl.float64), 0)
    tl.store(target, high, mask=mask)
    tl.store(target + 1, low.to(tl.float32), mask=mask)


@triton.jit
def _combine_kernel(
    parts: tl.tuple,  # unspecialized, like centers, channel_counts and part_counts
    centers: tl.tuple,
    channel_counts: tl.tuple,
    part_counts: tl.tuple,
    moments: tl.tensor,
    offsets: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    start: tl.tensor,  # unspecialized, like layers and width
    layers: tl.tensor,
    width: tl.tensor,
    raw: tl.constexpr,
    block_parts: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    layer = tl.program_id(1)
    address = parts[0]
    center_address = centers[0]
    channel_count = channel_counts[0]
    count = part_counts[0]
    for i in tl.static_range(1, len(parts)):
        selected = layer == i
        address = tl.where(selected, parts[i], address)
        center_address = tl.where(selected, centers[i], center_address)
        channel_count = tl.where(selected, channel_counts[i], channel_count)
        count = tl.where(selected, part_counts[i], count)
    source = (address // -2).to(tl.int64).to(tl.pointer_type(tl.float32))
    channel_count = channel_count // -2
    count = count // -2
    width = width // -2
    channels = (tl.program_id(0) * block_channels + tl.arange(0, block_channels)).to(tl.int64)
    mask = channels < channel_count
    first = tl.zeros((block_channels, block_parts), tl.float64)
    second = first
    for begin in range(0, count, block_parts):
        part = begin + tl.arange(0, block_parts)
        part_mask = mask[:, None] & (part < count)[None, :]
        part_pointers = source + channels[:, None] * count + part[None, :]
        first += tl.load(part_pointers, mask=part_mask, other=0).to(tl.float64)
        second += tl.load(part_pointers + channel_count.to(tl.int64) * count, mask=part_mask, other=0).to(tl.float64)
    offset = tl.sum(first, axis=1)
    square = tl.sum(second, axis=1)
    center = tl.load((center_address // -2).to(tl.int64).to(tl.pointer_type(tl.float32)) + channels, mask=mask, other=0).to(tl.float64)
    # Without parts, the tensor is empty.
    mean = tl.where(mask & (count == 0), float("nan"), center + offset)
    spread = square - offset * offset
    spread = tl.where(spread < 0, 0, spread)
    if raw:
        # If the moment about the center is infinite, so is that about 0; the formula would give ∞ − ∞.
        spread = tl.where(square < float("inf"), square + center * (2 * offset + center), square)
    spread = tl.where(mask & (count == 0), float("nan"), spread)
    row = (start // -2 + layer).to(tl.int64) * width + channels
    plane = (layers // -2).to(tl.int64) * width
    inside = channels < width
    if scale is not None:
        mean *= tl.load(scale + row, mask=inside)
        spread *= tl.load(scale + plane + row, mask=inside)
    if shift is not None:
        mean += tl.load(shift + row, mask=inside)
        spread += tl.load(shift + plane + row, mask=inside)
    tl.store(moments + row, mean.to(moments.dtype.element_ty), mask=inside)
    tl.store(moments + plane + row, spread.to(moments.dtype.element_ty), mask=inside)
    tl.store(offsets + row, offset.to(tl.float32), mask=inside)


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
