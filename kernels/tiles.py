"""Shared code of the Triton kernels: tiling of tensors into rows × channels, launches, and activations."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import interpreting

__all__ = [
    "Sizes",
    "activate",
    "activation_slope",
    "channel_constant",
    "combine_partials",
    "decode_sizes",
    "launch",
    "launch_tiles",
    "layout",
    "layout_arguments",
    "load",
    "num_splits",
    "num_tiles",
    "pointers",
    "program_tile",
    "store",
    "tile_rows",
    "tile_shape",
    "unspecialized",
]

Sizes = tuple[int, int, int, int]
BLOCK = 2048  # elements per tile
INTERPRETED = tl.constexpr(interpreting())


def layout(*tensors: Tensor) -> tuple[Sizes, list[Sizes]]:
    """View tensors of the same shape, (N, C) or (N, C, H, W), as (outer, inner, rows, channels).

    N, H and W are coalesced into one dimension of rows as far as the strides of all tensors allow: all three in channels-last,
    H and W in contiguous tensors. The dimensions that cannot be coalesced become the outer and inner dimensions.

    Returns:
        sizes: the four sizes; the outer size is 0 for empty tensors.
        strides: the four strides of each tensor, in elements.
    """
    zeros = (0,) * len(tensors)
    merged: list[tuple[int, tuple[int, ...]]] = []
    for dimension, size in enumerate(tensors[0].shape):
        if dimension == 1 or size == 1:
            continue
        strides = tuple(tensor.stride(dimension) for tensor in tensors)
        if merged and all(outer == size * inner for outer, inner in zip(merged[-1][1], strides, strict=True)):
            merged[-1] = (merged[-1][0] * size, strides)
        else:
            merged.append((size, strides))
    outer, inner, rows = [(1, zeros)] * (3 - len(merged)) + merged
    channels = tuple(tensor.stride(1) for tensor in tensors)
    sizes = (outer[0], inner[0], rows[0], tensors[0].shape[1]) if tensors[0].numel() else (0, 1, 1, 1)
    return sizes, list(zip(outer[1], inner[1], rows[1], channels, strict=True))


def tile_shape(sizes: Sizes, strides: Sizes) -> tuple[int, int]:
    """Return the rows and channels of a tile of 2048 elements, larger along the dimension with the smaller stride.

    Only a few shapes are used, because a kernel is compiled for each.
    """
    _, _, rows, channels = sizes
    if channels == 1:
        return BLOCK, 1
    if strides[3] == 1:
        wide = next((wide for wide in (4, 16, 32) if wide >= channels), 64)
        return BLOCK // wide, wide
    long = next((long for long in (64, 256) if long >= rows), 512) if strides[2] == 1 else 64
    return long, BLOCK // long


def num_tiles(sizes: Sizes, block_rows: int) -> int:
    """Return the number of tiles of ``block_rows`` rows."""
    return sizes[0] * sizes[1] * triton.cdiv(sizes[2], block_rows)


def num_splits(sizes: Sizes, block_rows: int, block_channels: int) -> int:
    """Return the number of programs per sum over rows, about 1024 in total; independent of the device, for reproducible sums."""
    return min(num_tiles(sizes, block_rows), max(1, 1024 // triton.cdiv(sizes[3], block_channels)))


def launch(on: Tensor, kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, enable_fp_fusion: bool = True) -> None:
    """Launch a kernel on the device of a tensor; does nothing if the grid is empty.

    Without ``enable_fp_fusion``, products are rounded before they are added, so that equal inputs give exactly equal results.
    """
    if all(grid):
        with torch.cuda.device_of(on):
            kernel[grid](*arguments, num_warps=num_warps, enable_fp_fusion=enable_fp_fusion)


def launch_tiles(kernel: Any, tensors: Sequence[Tensor], *constants: Any) -> None:
    """Launch a kernel with one program per tile of tensors of the same shape; the tile shape follows the strides of the first.

    The kernel's arguments are the tensors, the constants, those of ``layout_arguments``, and the rows and channels of a tile.
    """
    sizes, strides = layout(*tensors)
    block_rows, block_channels = tile_shape(sizes, strides[0])
    grid = num_tiles(sizes, block_rows), triton.cdiv(sizes[3], block_channels)
    launch(tensors[0], kernel, grid, *tensors, *constants, *layout_arguments(sizes, tensors, strides), block_rows, block_channels)


def layout_arguments(sizes: Sizes, tensors: Sequence[Tensor | None], strides: Sequence[Sizes]) -> tuple[Any, ...]:
    """Return the kernel arguments ``sizes``, the ``strides`` of each tensor, and ``accesses``.

    Triton specializes a kernel on every integer argument that is 1 or a multiple of 16. Sizes and strides are therefore passed
    unspecialized, and the constexpr ``accesses`` contains what matters for speed: the known divisors of the rows and of the
    channels, 1 or 16, and for each tensor its contiguous dimension: "rows" or "channels"; "aligned rows" or "aligned channels"
    if 16-byte accesses are possible; "strided" for all tensors if one has no contiguous dimension.
    """
    accesses = ["none" if tensor is None else _access(sizes, tensor, of) for tensor, of in zip(tensors, strides, strict=True)]
    if "strided" in accesses:  # rare and slow, so not worth compiling many variants
        accesses = ["strided"] * len(accesses)
    divisors = (16 if f"aligned {dimension}" in accesses else 1 for dimension in ("rows", "channels"))
    return unspecialized(sizes), *map(unspecialized, strides), (*divisors, *accesses)


def unspecialized(numbers: Sequence[int]) -> tuple[int, ...]:
    """Encode integers n ≥ 0 as −2n − 1, on which Triton does not specialize (odd, never 1). Decoded in a kernel by ``// -2``."""
    return tuple(-2 * number - 1 for number in numbers)


def _access(sizes: Sizes, tensor: Tensor, strides: Sizes) -> str:
    for dimension, name, other in ((2, "rows", 3), (3, "channels", 2)):
        if strides[dimension] == 1 and (sizes[dimension] > 1 or sizes[other] == 1):
            apart = [stride for index, (size, stride) in enumerate(zip(sizes, strides, strict=True)) if size > 1 and index != dimension]
            aligned = not any(number % 16 for number in (tensor.data_ptr(), sizes[dimension], *apart))
            return f"aligned {name}" if aligned else name
    return "strided"


@triton.jit
def decode_sizes(sizes: tl.tuple, accesses: tl.constexpr) -> tl.tuple:
    """Decode the sizes passed by ``layout_arguments``."""
    row_divisor: tl.constexpr = accesses[0]
    channel_divisor: tl.constexpr = accesses[1]
    rows = sizes[2] // (-2 * row_divisor) * row_divisor
    return sizes[0] // -2, sizes[1] // -2, rows, sizes[3] // (-2 * channel_divisor) * channel_divisor


@triton.jit
def tile_rows(index: tl.tensor, sizes: tl.tuple, block_rows: tl.constexpr) -> tl.tuple:
    """Return the outer × inner index of a tile and the offsets of its rows."""
    tiles = tl.cdiv(sizes[2], block_rows)
    return index // tiles, (index % tiles).to(tl.int64) * block_rows + tl.arange(0, block_rows)


@triton.jit
def program_tile(sizes: tl.tuple, accesses: tl.constexpr, block_rows: tl.constexpr, block_channels: tl.constexpr) -> tl.tuple:
    """Return the decoded sizes and the group, rows, channels and mask of this program's tile, for ``launch_tiles``."""
    sizes = decode_sizes(sizes, accesses)
    group, rows = tile_rows(tl.program_id(0), sizes, block_rows)
    channels = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    return sizes, group, rows, channels, (rows < sizes[2])[:, None] & (channels < sizes[3])[None, :]


@triton.jit
def pointers(
    base: tl.tensor,
    group: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    sizes: tl.tuple,
    strides: tl.tuple,
    accesses: tl.constexpr,
    index: tl.constexpr,
) -> tl.tensor:
    """Return pointers to a tile of the tensor at ``base``, the ``index``-th of ``accesses``, with 64-bit offsets."""
    access: tl.constexpr = accesses[2 + index]
    # Multiplying by the divisor tells the compiler that the stride is a multiple of 16.
    divisor: tl.constexpr = 16 if access == "aligned rows" or access == "aligned channels" else 1
    outer = (group // sizes[1]).to(tl.int64) * (strides[0] // (-2 * divisor) * divisor)
    inner = (group % sizes[1]).to(tl.int64) * (strides[1] // (-2 * divisor) * divisor)
    row_offsets = rows
    if access != "rows" and access != "aligned rows":
        row_offsets = rows * (strides[2] // (-2 * divisor) * divisor)
    channel_offsets = channels.to(tl.int64)
    if access != "channels" and access != "aligned channels":
        channel_offsets *= strides[3] // (-2 * divisor) * divisor
    start = base + (outer + inner)
    if divisor == 16:
        start = tl.multiple_of(start, 16)
    return start + (row_offsets[:, None] + channel_offsets[None, :])


@triton.jit
def channel_constant(values: tl.tensor, channels: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Load a per-channel constant, broadcast over rows."""
    return tl.load(values + channels, mask=mask, other=0)[None, :]


@triton.jit
def combine_partials(
    partials: tl.tensor,
    parts: tl.tensor,
    channels: tl.tensor,
    channel_count: tl.tensor,
    block_parts: tl.constexpr,
) -> tl.tuple:
    """Reduce partial sums (2, parts, channels) to two float64 sums per channel, in a fixed order."""
    channel_mask = channels < channel_count
    first = tl.zeros((block_parts, channels.shape[0]), tl.float64)
    second = first
    for start in range(0, parts, block_parts):
        part = start + tl.arange(0, block_parts)
        mask = (part < parts)[:, None] & channel_mask[None, :]
        partial_pointers = partials + part[:, None] * channel_count + channels[None, :]
        first += tl.load(partial_pointers, mask=mask, other=0).to(tl.float64)
        second += tl.load(partial_pointers + parts * channel_count, mask=mask, other=0).to(tl.float64)
    return tl.sum(first, axis=0), tl.sum(second, axis=0)


@triton.jit
def load(pointers: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Load values as float32; 0 where the mask is false."""
    return tl.load(pointers, mask=mask, other=0).to(tl.float32)


@triton.jit
def store(pointers: tl.tensor, values: tl.tensor, mask: tl.tensor) -> None:
    """Store float32 values in the dtype of the pointers, rounded to nearest even."""
    if INTERPRETED and pointers.dtype.element_ty == tl.bfloat16:
        # The interpreter's cast to bfloat16 truncates.
        bits = values.to(tl.uint32, bitcast=True)
        rounded = tl.where(values == values, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        tl.store(pointers, rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def activate(x: tl.tensor, activation: tl.constexpr) -> tl.tensor:
    """Apply a generator's final activation: "tanh", "sigmoid" or "none"."""
    y = x
    if activation == "tanh":
        y = _tanh(x)
    elif activation == "sigmoid":
        y = 1 / (1 + tl.exp(-x))
    return y


@triton.jit
def activation_slope(y: tl.tensor, activation: tl.constexpr) -> tl.tensor:
    """Return the derivative of the activation as a function of its output ``y``."""
    slope = tl.full(y.shape, 1.0, tl.float32)
    if activation == "tanh":
        slope = 1 - y * y
    elif activation == "sigmoid":
        slope = y * (1 - y)
    return slope


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    # Relative error 1.4e-7. libdevice is not available in the interpreter, and the formula with exp cancels near 0; there,
    # tanh(x)/x = 1 + x² P(x²), with P interpolated at the Chebyshev nodes of x² in [0, 1].
    square = x * x
    p = -0.00042069549090228975
    p = p * square + 0.0025104593951255083
    p = p * square - 0.008218921720981598
    p = p * square + 0.02166011556982994
    p = p * square - 0.053934790194034576
    p = p * square + 0.1333312839269638
    p = p * square - 0.3333333134651184
    tail = 1 - 2 / (1 + tl.exp2(tl.abs(x) * 2.8853900817779268))  # e²ˣ = 2 to the power of x · 2/ln 2
    return tl.where(square < 1, x + x * (square * p), tl.where(x < 0, -tail, tail))
