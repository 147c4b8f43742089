"""What the Triton kernels share: how tensors are cut into tiles of rows × channels, and the arithmetic of images."""

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
    "combined",
    "disguised",
    "launch",
    "launch_tiles",
    "layout",
    "load",
    "packed",
    "pointers",
    "program_tile",
    "programs",
    "revealed",
    "splits",
    "store",
    "tile",
    "tile_rows",
]

Sizes = tuple[int, int, int, int]
BLOCK = 2048  # elements of a tile
INTERPRETED = tl.constexpr(interpreting())


def layout(*tensors: Tensor) -> tuple[Sizes, list[Sizes]]:
    """Tensors of one shape, (N, C) or (N, C, H, W), as (outer, inner, rows, channels) for the kernels.

    N, H and W become one dimension of rows wherever the strides of every tensor allow it: all of them in
    channels-last, H and W in contiguous tensors. What is left over are the outer and inner dimensions.

    Returns:
        The four sizes, and four strides a tensor; no outer dimension where the tensors are empty.
    """
    none = (0,) * len(tensors)
    merged: list[tuple[int, tuple[int, ...]]] = []
    for dimension, size in enumerate(tensors[0].shape):
        if dimension == 1 or size == 1:
            continue
        strides = tuple(tensor.stride(dimension) for tensor in tensors)
        if merged and all(outer == size * inner for outer, inner in zip(merged[-1][1], strides, strict=True)):
            merged[-1] = (merged[-1][0] * size, strides)
        else:
            merged.append((size, strides))
    outer, inner, rows = [(1, none)] * (3 - len(merged)) + merged
    channels = tuple(tensor.stride(1) for tensor in tensors)
    sizes = (outer[0], inner[0], rows[0], tensors[0].shape[1]) if tensors[0].numel() else (0, 1, 1, 1)
    return sizes, list(zip(outer[1], inner[1], rows[1], channels, strict=True))


def tile(sizes: Sizes, strides: Sizes) -> tuple[int, int]:
    """Rows and channels of a tile of 2048 elements, longer along the dimension that is denser in memory.

    There are few shapes, because a kernel is compiled for each.
    """
    _, _, rows, channels = sizes
    if channels == 1:
        return BLOCK, 1
    if strides[3] == 1:
        wide = next((wide for wide in (4, 16, 32) if wide >= channels), 64)
        return BLOCK // wide, wide
    long = next((long for long in (64, 256) if long >= rows), 512) if strides[2] == 1 else 64
    return long, BLOCK // long


def programs(sizes: Sizes, block_rows: int) -> int:
    """How many tiles of ``block_rows`` rows there are."""
    return sizes[0] * sizes[1] * triton.cdiv(sizes[2], block_rows)


def splits(sizes: Sizes, block_rows: int, block_channels: int) -> int:
    """How many programs share the rows of a sum: about 1024 in all, on every device the same, and so are the sums."""
    return min(programs(sizes, block_rows), max(1, 1024 // triton.cdiv(sizes[3], block_channels)))


def launch(on: Tensor, kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, fuse: bool = True) -> None:
    """Run a kernel on the device of a tensor, or nothing if the grid is empty.

    Unless ``fuse``, products are rounded before they are added: then equal inputs leave exactly equal results.
    """
    if all(grid):
        with torch.cuda.device_of(on):
            kernel[grid](*arguments, num_warps=warps, enable_fp_fusion=fuse)


def launch_tiles(kernel: Any, tensors: Sequence[Tensor], *constants: Any) -> None:
    """Run a kernel on every tile of tensors of one shape, which are cut as suits the first.

    Its arguments are the tensors, the constants, those that ``packed`` returns, and the rows and channels of a tile.
    """
    sizes, strides = layout(*tensors)
    block_rows, block_channels = tile(sizes, strides[0])
    grid = programs(sizes, block_rows), triton.cdiv(sizes[3], block_channels)
    launch(tensors[0], kernel, grid, *tensors, *constants, *packed(sizes, tensors, strides), block_rows, block_channels)


def packed(sizes: Sizes, tensors: Sequence[Tensor | None], strides: Sequence[Sizes]) -> tuple[Any, ...]:
    """A kernel's arguments ``sizes``, the ``strides`` of each tensor, and ``accesses``.

    Triton compiles a kernel anew for every pattern of ones and multiples of 16 among its integers. Sizes and strides are
    therefore disguised, and ``accesses`` says what makes a kernel fast. It holds the known divisors of the rows and of the
    channels, 1 or 16, and for each tensor the dimension whose elements are adjacent in memory: "rows" or "channels";
    "aligned rows" or "aligned channels" if 16 bytes can be accessed at once; "strided" for all if one has no such dimension.
    """
    accesses = ["none" if tensor is None else _access(sizes, tensor, of) for tensor, of in zip(tensors, strides, strict=True)]
    if "strided" in accesses:  # rare and slow anyway, so that it is not worth many kernels
        accesses = ["strided"] * len(accesses)
    divisors = (16 if f"aligned {dimension}" in accesses else 1 for dimension in ("rows", "channels"))
    return disguised(sizes), *map(disguised, strides), (*divisors, *accesses)


def disguised(numbers: Sequence[int]) -> tuple[int, ...]:
    """Numbers n ≥ 0 as −2n − 1: odd, and never 1. Divided by −2 in a kernel they are n again."""
    return tuple(-2 * number - 1 for number in numbers)


def _access(sizes: Sizes, tensor: Tensor, strides: Sizes) -> str:
    for dimension, name, other in ((2, "rows", 3), (3, "channels", 2)):
        if strides[dimension] == 1 and (sizes[dimension] > 1 or sizes[other] == 1):
            apart = [stride for index, (size, stride) in enumerate(zip(sizes, strides, strict=True)) if size > 1 and index != dimension]
            aligned = not any(number % 16 for number in (tensor.data_ptr(), sizes[dimension], *apart))
            return f"aligned {name}" if aligned else name
    return "strided"


@triton.jit
def revealed(sizes: tl.tuple, accesses: tl.constexpr) -> tl.tuple:
    """The four sizes, which ``packed`` has disguised."""
    row_divisor: tl.constexpr = accesses[0]
    channel_divisor: tl.constexpr = accesses[1]
    rows = sizes[2] // (-2 * row_divisor) * row_divisor
    return sizes[0] // -2, sizes[1] // -2, rows, sizes[3] // (-2 * channel_divisor) * channel_divisor


@triton.jit
def tile_rows(index: tl.tensor, sizes: tl.tuple, block_rows: tl.constexpr) -> tl.tuple:
    """The outer × inner group of the tile of this index, and its rows."""
    tiles = tl.cdiv(sizes[2], block_rows)
    return index // tiles, (index % tiles).to(tl.int64) * block_rows + tl.arange(0, block_rows)


@triton.jit
def program_tile(sizes: tl.tuple, accesses: tl.constexpr, block_rows: tl.constexpr, block_channels: tl.constexpr) -> tl.tuple:
    """For a program of ``launch_tiles``, the revealed sizes, and the group, rows, channels and mask of its tile."""
    sizes = revealed(sizes, accesses)
    group, rows = tile_rows(tl.program_id(0), sizes, block_rows)
    channels = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    return sizes, group, rows, channels, (rows < sizes[2])[:, None] & (channels < sizes[3])[None, :]


@triton.jit
def pointers(
    first: tl.tensor,
    group: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    sizes: tl.tuple,
    strides: tl.tuple,
    accesses: tl.constexpr,
    index: tl.constexpr,
) -> tl.tensor:
    """To a tile of the tensor that begins at ``first``, the ``index``-th in ``accesses``; in 64 bits, for beyond 2³¹ elements."""
    access: tl.constexpr = accesses[2 + index]
    # A stride that is a multiple of 16 is made one in a way that the compiler sees.
    divisor: tl.constexpr = 16 if access == "aligned rows" or access == "aligned channels" else 1
    outer = (group // sizes[1]).to(tl.int64) * (strides[0] // (-2 * divisor) * divisor)
    inner = (group % sizes[1]).to(tl.int64) * (strides[1] // (-2 * divisor) * divisor)
    row_offsets = rows
    if access != "rows" and access != "aligned rows":
        row_offsets = rows * (strides[2] // (-2 * divisor) * divisor)
    channel_offsets = channels.to(tl.int64)
    if access != "channels" and access != "aligned channels":
        channel_offsets *= strides[3] // (-2 * divisor) * divisor
    start = first + (outer + inner)
    if divisor == 16:
        start = tl.multiple_of(start, 16)
    return start + (row_offsets[:, None] + channel_offsets[None, :])


@triton.jit
def combined(
    partials: tl.tensor,
    parts: tl.tensor,
    channels: tl.tensor,
    channel_count: tl.tensor,
    block_parts: tl.constexpr,
) -> tl.tuple:
    """Two sums of every channel, in float64, from the partial sums (2, parts, channels) of as many programs, always added in one order."""
    real = channels < channel_count
    first = tl.zeros((block_parts, channels.shape[0]), tl.float64)
    second = first
    for start in range(0, parts, block_parts):
        part = start + tl.arange(0, block_parts)
        mask = (part < parts)[:, None] & real[None, :]
        of = partials + part[:, None] * channel_count + channels[None, :]
        first += tl.load(of, mask=mask, other=0).to(tl.float64)
        second += tl.load(of + parts * channel_count, mask=mask, other=0).to(tl.float64)
    return tl.sum(first, axis=0), tl.sum(second, axis=0)


@triton.jit
def load(pointers: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Values in float32, 0 where the mask is not set."""
    return tl.load(pointers, mask=mask, other=0).to(tl.float32)


@triton.jit
def store(pointers: tl.tensor, values: tl.tensor, mask: tl.tensor) -> None:
    """Store float32 values in the pointers' dtype, rounded to nearest even."""
    if INTERPRETED and pointers.dtype.element_ty == tl.bfloat16:
        # The interpreter's own cast truncates.
        bits = values.to(tl.uint32, bitcast=True)
        rounded = tl.where(values == values, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        tl.store(pointers, rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def activate(x: tl.tensor, activation: tl.constexpr) -> tl.tensor:
    """What a generator ends in: "tanh", "sigmoid" or "none"."""
    y = x
    if activation == "tanh":
        y = _tanh(x)
    elif activation == "sigmoid":
        y = 1 / (1 + tl.exp(-x))
    return y


@triton.jit
def activation_slope(y: tl.tensor, activation: tl.constexpr) -> tl.tensor:
    """The activation's derivative where its value is ``y``."""
    slope = tl.full(y.shape, 1.0, tl.float32)
    if activation == "tanh":
        slope = 1 - y * y
    elif activation == "sigmoid":
        slope = y * (1 - y)
    return slope


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    # Relative error 1.4e-7. libdevice's is unknown to the interpreter, and exp alone cancels near 0: there,
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
