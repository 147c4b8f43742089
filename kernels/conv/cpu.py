"""Winograd transforms in numba, for channels-last float32 tensors; the matrix product between them is PyTorch's.

A tile has 6×6 input pixels, which overlap the next tile by two, and 4×4 output pixels. Each transform multiplies a tile by a small
matrix from both sides, vectorized over the channels.
"""

from typing import Any

import numpy as np
from numba import prange
from torch import Tensor

from .. import simd
from ..simd import TypedPointer

__all__ = ["add_tiles", "from_tiles", "from_tiles_adjoint", "tile_grid", "to_tiles"]

TWO, FOUR, FIVE, EIGHT = (np.float32(value) for value in (2, 4, 5, 8))
ZERO = np.float32(0)


def tile_grid(height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns of tiles that cover the output."""
    return -(-height // 4), -(-width // 4)


def to_tiles(x: Tensor, padding: tuple[int, ...], grid: tuple[int, int]) -> Tensor:
    """Input transform: return Bᵀ d B for every input tile d, (36, tiles, C)."""
    batch, channels, height, width = x.shape
    tiles = x.new_empty(36, batch * grid[0] * grid[1], channels)
    with simd.threads:
        _to_tiles(simd.typed_pointer(x), simd.typed_pointer(tiles), batch, height, width, channels, *padding, *grid)
    return tiles


def add_tiles(tiles: Tensor, x: Tensor, padding: tuple[int, ...], grid: tuple[int, int]) -> None:
    """Adjoint of ``to_tiles``: add B v Bᵀ for every tile v to ``x``, in place."""
    batch, channels, height, width = x.shape
    with simd.threads:
        _add_tiles(simd.typed_pointer(tiles), simd.typed_pointer(x), batch, height, width, channels, *padding, *grid)


def from_tiles(tiles: Tensor, bias: Tensor, y: Tensor, grid: tuple[int, int]) -> None:
    """Output transform: write Aᵀ m A + bias for every tile m to ``y`` (N, C, H, W)."""
    batch, channels, height, width = y.shape
    with simd.threads:
        _from_tiles(simd.typed_pointer(tiles), simd.typed_pointer(bias), simd.typed_pointer(y), batch, height, width, channels, *grid)


def from_tiles_adjoint(gradient: Tensor, grid: tuple[int, int]) -> Tensor:
    """Adjoint of ``from_tiles``: return A g Aᵀ for every tile g of the output gradient, (36, tiles, C)."""
    batch, channels, height, width = gradient.shape
    tiles = gradient.new_empty(36, batch * grid[0] * grid[1], channels)
    with simd.threads:
        _from_tiles_adjoint(simd.typed_pointer(gradient), simd.typed_pointer(tiles), batch, height, width, channels, *grid)
    return tiles


@simd.inline
def _b_transposed(d0: Any, d1: Any, d2: Any, d3: Any, d4: Any, d5: Any) -> Any:
    even, odd = d4 - FOUR * d2, d3 - FOUR * d1
    near, far = d4 - d2, TWO * (d3 - d1)
    return FOUR * d0 - FIVE * d2 + d4, even + odd, even - odd, near + far, near - far, FOUR * d1 - FIVE * d3 + d5


@simd.inline
def _b(v0: Any, v1: Any, v2: Any, v3: Any, v4: Any, v5: Any) -> Any:
    near, near_odd, far, far_odd = v1 + v2, v1 - v2, v3 + v4, TWO * (v3 - v4)
    return (
        FOUR * v0,
        FOUR * (v5 - near_odd) - far_odd,
        -(FIVE * v0 + FOUR * near + far),
        near_odd + far_odd - FIVE * v5,
        v0 + near + far,
        v5,
    )


@simd.inline
def _a_transposed(m0: Any, m1: Any, m2: Any, m3: Any, m4: Any, m5: Any) -> Any:
    near, near_odd, far, far_odd = m1 + m2, m1 - m2, m3 + m4, m3 - m4
    return m0 + near + far, near_odd + TWO * far_odd, near + FOUR * far, near_odd + EIGHT * far_odd + m5


@simd.inline
def _a(g0: Any, g1: Any, g2: Any, g3: Any) -> Any:
    near, near_odd = g0 + g2, g1 + g3
    far, far_odd = g0 + FOUR * g2, TWO * g1 + EIGHT * g3
    return g0, near + near_odd, near - near_odd, far + far_odd, far - far_odd, g3


@simd.inline
def _column(tiles: Any, base: int, stride: int) -> Any:
    """Return a column of a tile whose rows have the given stride."""
    return (
        tiles[base],
        tiles[base + stride],
        tiles[base + 2 * stride],
        tiles[base + 3 * stride],
        tiles[base + 4 * stride],
        tiles[base + 5 * stride],
    )


@simd.parallel
def _to_tiles(
    x: TypedPointer, tiles: TypedPointer, batch: int, height: int, width: int, channels: int, top: int, left: int, rows: int, columns: int
) -> None:
    source, out = simd.pointer(x), simd.pointer(tiles)
    count = batch * rows * columns
    plane = count * channels
    for tile in prange(count):
        image, first_row, first_column = tile // (rows * columns), tile // columns % rows * 4 - top, tile % columns * 4 - left
        d, tmp = np.empty((6, 6, channels), np.float32), np.empty((6, 6, channels), np.float32)
        for i in range(6):
            for j in range(6):
                row, column = first_row + i, first_column + j
                if 0 <= row < height and 0 <= column < width:
                    base = ((image * height + row) * width + column) * channels
                    for k in range(channels):
                        d[i, j, k] = source[base + k]
                else:
                    for k in range(channels):
                        d[i, j, k] = ZERO
        for j in range(6):
            for k in range(channels):
                v = _b_transposed(d[0, j, k], d[1, j, k], d[2, j, k], d[3, j, k], d[4, j, k], d[5, j, k])
                tmp[0, j, k], tmp[1, j, k], tmp[2, j, k] = v[0], v[1], v[2]
                tmp[3, j, k], tmp[4, j, k], tmp[5, j, k] = v[3], v[4], v[5]
        for i in range(6):
            base = 6 * i * plane + tile * channels
            for k in range(channels):
                v = _b_transposed(tmp[i, 0, k], tmp[i, 1, k], tmp[i, 2, k], tmp[i, 3, k], tmp[i, 4, k], tmp[i, 5, k])
                out[base + k], out[base + plane + k], out[base + 2 * plane + k] = v[0], v[1], v[2]
                out[base + 3 * plane + k], out[base + 4 * plane + k], out[base + 5 * plane + k] = v[3], v[4], v[5]


@simd.parallel
def _add_tiles(
    tiles: TypedPointer, x: TypedPointer, batch: int, height: int, width: int, channels: int, top: int, left: int, rows: int, columns: int
) -> None:
    source, out = simd.pointer(tiles), simd.pointer(x)
    plane = batch * rows * columns * channels
    # One task per image, because adjacent tiles add to the same pixels.
    for image in prange(batch):
        tmp = np.empty((6, 6, channels), np.float32)
        for tile in range(image * rows * columns, (image + 1) * rows * columns):
            first_row, first_column = tile // columns % rows * 4 - top, tile % columns * 4 - left
            for j in range(6):
                base = j * plane + tile * channels
                for k in range(channels):
                    v = _column(source, base + k, 6 * plane)
                    d = _b(v[0], v[1], v[2], v[3], v[4], v[5])
                    tmp[0, j, k], tmp[1, j, k], tmp[2, j, k] = d[0], d[1], d[2]
                    tmp[3, j, k], tmp[4, j, k], tmp[5, j, k] = d[3], d[4], d[5]
            for i in range(6):
                for k in range(channels):
                    d = _b(tmp[i, 0, k], tmp[i, 1, k], tmp[i, 2, k], tmp[i, 3, k], tmp[i, 4, k], tmp[i, 5, k])
                    tmp[i, 0, k], tmp[i, 1, k], tmp[i, 2, k] = d[0], d[1], d[2]
                    tmp[i, 3, k], tmp[i, 4, k], tmp[i, 5, k] = d[3], d[4], d[5]
                for j in range(6):
                    row, column = first_row + i, first_column + j
                    if 0 <= row < height and 0 <= column < width:
                        base = ((image * height + row) * width + column) * channels
                        for k in range(channels):
                            out[base + k] += tmp[i, j, k]


@simd.parallel
def _from_tiles(
    tiles: TypedPointer, bias: TypedPointer, y: TypedPointer, batch: int, height: int, width: int, channels: int, rows: int, columns: int
) -> None:
    source, offset, out = simd.pointer(tiles), simd.pointer(bias), simd.pointer(y)
    count = batch * rows * columns
    plane = count * channels
    for tile in prange(count):
        image, first_row, first_column = tile // (rows * columns), tile // columns % rows * 4, tile % columns * 4
        tmp = np.empty((4, 6, channels), np.float32)
        for j in range(6):
            base = j * plane + tile * channels
            for k in range(channels):
                v = _column(source, base + k, 6 * plane)
                m = _a_transposed(v[0], v[1], v[2], v[3], v[4], v[5])
                tmp[0, j, k], tmp[1, j, k], tmp[2, j, k], tmp[3, j, k] = m[0], m[1], m[2], m[3]
        for i in range(min(4, height - first_row)):
            for k in range(channels):
                m = _a_transposed(tmp[i, 0, k], tmp[i, 1, k], tmp[i, 2, k], tmp[i, 3, k], tmp[i, 4, k], tmp[i, 5, k])
                tmp[i, 0, k], tmp[i, 1, k], tmp[i, 2, k], tmp[i, 3, k] = m[0], m[1], m[2], m[3]
            for j in range(min(4, width - first_column)):
                base = ((image * height + first_row + i) * width + first_column + j) * channels
                for k in range(channels):
                    out[base + k] = tmp[i, j, k] + offset[k]


@simd.parallel
def _from_tiles_adjoint(
    gradient: TypedPointer, tiles: TypedPointer, batch: int, height: int, width: int, channels: int, rows: int, columns: int
) -> None:
    source, out = simd.pointer(gradient), simd.pointer(tiles)
    count = batch * rows * columns
    plane = count * channels
    for tile in prange(count):
        image, first_row, first_column = tile // (rows * columns), tile // columns % rows * 4, tile % columns * 4
        g, tmp = np.empty((4, 4, channels), np.float32), np.empty((6, 4, channels), np.float32)
        for i in range(4):
            for j in range(4):
                if first_row + i < height and first_column + j < width:
                    base = ((image * height + first_row + i) * width + first_column + j) * channels
                    for k in range(channels):
                        g[i, j, k] = source[base + k]
                else:
                    for k in range(channels):
                        g[i, j, k] = ZERO
        for j in range(4):
            for k in range(channels):
                m = _a(g[0, j, k], g[1, j, k], g[2, j, k], g[3, j, k])
                tmp[0, j, k], tmp[1, j, k], tmp[2, j, k] = m[0], m[1], m[2]
                tmp[3, j, k], tmp[4, j, k], tmp[5, j, k] = m[3], m[4], m[5]
        for i in range(6):
            base = 6 * i * plane + tile * channels
            for k in range(channels):
                m = _a(tmp[i, 0, k], tmp[i, 1, k], tmp[i, 2, k], tmp[i, 3, k])
                out[base + k], out[base + plane + k], out[base + 2 * plane + k] = m[0], m[1], m[2]
                out[base + 3 * plane + k], out[base + 4 * plane + k], out[base + 5 * plane + k] = m[3], m[4], m[5]
