"""What the Triton kernels share: how tensors are cut into tiles of rows × channels, and the arithmetic of images."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import interpreting

__all__ = ["Sizes", "activate", "activation_slope", "launch", "layout", "offsets", "place", "programs", "splits", "store", "tile"]

Sizes = tuple[int, int, int, int]
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


def tile(sizes: Sizes, strides: Sizes, elements: int) -> tuple[int, int]:
    """Rows and channels of a tile of at most ``elements``, longer along the dimension that is denser in memory."""
    rows, channels = triton.next_power_of_2(sizes[2]), triton.next_power_of_2(sizes[3])
    if strides[3] < strides[2]:
        wide = min(channels, elements // 8)
        return min(rows, elements // wide), wide
    long = min(rows, elements // min(channels, 4))
    return long, min(channels, elements // long)


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


@triton.jit
def place(index: tl.tensor, sizes: tl.tuple, block_rows: tl.constexpr) -> tl.tuple:
    """The outer × inner group of the tile of this index, and its rows."""
    tiles = tl.cdiv(sizes[2], block_rows)
    return index // tiles, (index % tiles).to(tl.int64) * block_rows + tl.arange(0, block_rows)


@triton.jit
def offsets(group: tl.tensor, rows: tl.tensor, channels: tl.tensor, sizes: tl.tuple, strides: tl.tuple) -> tl.tensor:
    """Where in a tensor the elements of a tile are; in 64 bits, for tensors beyond 2³¹ elements."""
    start = (group // sizes[1]).to(tl.int64) * strides[0] + (group % sizes[1]).to(tl.int64) * strides[1]
    return start + rows[:, None] * strides[2] + channels[None, :].to(tl.int64) * strides[3]


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
