"""Bias, residual, activation and moments in numba.

Elements are processed in rows of about 512, which are float32 arrays in the cache: some pixels of a channels-last tensor, or part of a
plane of a contiguous one. Consecutive rows with the same per-channel constants are a group.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import prange
from torch import Tensor

from .. import simd
from ..moments.cpu import finish_moments
from ..simd import HALF, ONE, ZERO, TypedPointer

__all__ = [
    *("ACTIVATIONS", "Grid", "bias_act_backward", "bias_act_forward", "bias_act_moments_forward", "memory_format", "prepared"),
    *("read_constants", "read_gradient", "sum_pixels", "totals", "write", "write_activated"),
]

ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2, "silu": 3, "hardswish": 4, "leaky_relu": 5}
THREE, SIX = np.float32(3), np.float32(6)
ROW = 512


class Grid(NamedTuple):
    """Division of a tensor into tasks, groups and rows, in elements."""

    size: int
    channels: int
    task: int
    group: int
    row: int
    channels_of_group: int
    """All, in turn, in channels-last; 1 in a plane."""


def bias_act_forward(x: Tensor, bias: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    return _run_forward(x, bias, residual, activation, bias, bias, blocks=0)


def bias_act_moments_forward(
    x: Tensor, bias: Tensor, residual: Tensor | None, activation: str, blocks: int
) -> tuple[Tensor, Tensor, Tensor]:
    moments, center = x.new_zeros((2, x.shape[1], 2 * blocks), dtype=torch.float32), torch.empty_like(bias)
    return _run_forward(x, bias, residual, activation, moments, center, blocks), moments, center


def bias_act_backward(
    gradient: Tensor,
    x: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    activation: str,
    grad_mean: Tensor | None,
    grad_variance: Tensor | None,
    center: Tensor | None,
    scale: float,
    separate: bool,
) -> tuple[Tensor, Tensor]:
    source, other, grid = prepared(x, residual)
    gradient = gradient.contiguous(memory_format=memory_format(x))
    grad_x = torch.empty_like(source)
    grad_residual = torch.empty_like(source) if separate else grad_x
    constants = [bias if constant is None else constant for constant in (grad_mean, grad_variance, center)]
    tensors = gradient, source, other, grad_x, grad_residual, bias, *constants
    flags = residual is not None, grad_mean is not None, separate
    with simd.threads:
        _backward(*map(simd.typed_pointer, tensors), np.float32(scale), *flags, ACTIVATIONS[activation], grid)
    return simd.restride_like(grad_x, x), simd.restride_like(grad_residual, x) if separate else x.new_empty(0)


def _run_forward(x: Tensor, bias: Tensor, residual: Tensor | None, activation: str, moments: Tensor, center: Tensor, blocks: int) -> Tensor:
    source, other, grid = prepared(x, residual)
    y = torch.empty_like(source)
    tensors = source, other, y, bias, moments, center
    with simd.threads:
        _forward(*map(simd.typed_pointer, tensors), residual is not None, blocks, ACTIVATIONS[activation], grid)
    return simd.restride_like(y, x)


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the memory format in which the kernels process a tensor."""
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


def prepared(x: Tensor, residual: Tensor | None, rows_per_task: int = 16) -> tuple[Tensor, Tensor, Grid]:
    """Return x and residual (x if there is none) as dense tensors of the same strides, and their grid."""
    layout, channels, pixels = memory_format(x), x.shape[1], max(x.shape[2] * x.shape[3], 1)
    if layout == torch.channels_last:
        row = -(-ROW // max(channels, 1)) * max(channels, 1)
        grid = Grid(x.numel(), channels, rows_per_task * row, rows_per_task * row, row, channels)
    else:
        grid = Grid(x.numel(), channels, -(-rows_per_task * ROW // pixels) * pixels, pixels, min(pixels, ROW), 1)
    x = x.contiguous(memory_format=layout)
    return x, x if residual is None else residual.contiguous(memory_format=layout), grid


@simd.parallel
def _forward(
    x: TypedPointer,
    residual: TypedPointer,
    y: TypedPointer,
    bias: TypedPointer,
    moments: TypedPointer,
    center: TypedPointer,
    has_residual: bool,
    blocks: int,
    activation: int,
    grid: Grid,
) -> None:
    partial = np.empty((2, -(-grid.size // grid.group) * grid.channels_of_group if blocks else 0))
    for task in prange(-(-grid.size // grid.task)):
        b, row = np.empty(grid.row, np.float32), np.empty(grid.row, np.float32)
        total, square = np.empty(grid.row), np.empty(grid.row)
        for first in range(task * grid.task, min((task + 1) * grid.task, grid.size), grid.group):
            read_constants(bias, first, grid, b)
            total[:], square[:] = 0.0, 0.0
            end = min(first + grid.group, grid.size)
            for start in range(first, end, grid.row):
                u = row[: min(grid.row, end - start)]
                _read_sum(x, start, b, u)
                if blocks:
                    _accumulate(u, total, square)
                if has_residual:
                    _read_sum(residual, start, u, u)
                write_activated(u, activation, ZERO, y, start)
            if blocks:
                index = first // grid.group * grid.channels_of_group
                sum_pixels(total, partial[0, index : index + grid.channels_of_group])
                sum_pixels(square, partial[1, index : index + grid.channels_of_group])
    if blocks:
        finish_moments(moments, center, blocks, totals(partial, grid), grid.size // max(grid.channels, 1))


@simd.parallel
def _backward(
    gradient: TypedPointer,
    x: TypedPointer,
    residual: TypedPointer,
    grad_x: TypedPointer,
    grad_residual: TypedPointer,
    bias: TypedPointer,
    grad_mean: TypedPointer,
    grad_variance: TypedPointer,
    center: TypedPointer,
    scale: np.float32,
    has_residual: bool,
    has_moments: bool,
    separate: bool,
    activation: int,
    grid: Grid,
) -> None:
    for task in prange(-(-grid.size // grid.task)):
        constants, rows = np.empty((4, grid.row), np.float32), np.empty((3, grid.row), np.float32)
        for first in range(task * grid.task, min((task + 1) * grid.task, grid.size), grid.group):
            read_constants(bias, first, grid, constants[0])
            if has_moments:
                read_constants(grad_mean, first, grid, constants[1])
                read_constants(grad_variance, first, grid, constants[2])
                read_constants(center, first, grid, constants[3])
            end = min(first + grid.group, grid.size)
            for start in range(first, end, grid.row):
                count = min(grid.row, end - start)
                u, v, g = rows[0, :count], rows[1 if has_residual else 0, :count], rows[2, :count]
                _read_sum(x, start, constants[0], v)
                if has_residual:
                    _read_sum(residual, start, v, u)
                read_gradient(gradient, start, u, activation, ZERO, g)
                if separate:
                    write(g, grad_residual, start)
                if has_moments:
                    _add_gradient_of_moments(g, v, constants, scale)
                write(g, grad_x, start)


@simd.helper
def read_constants(values: TypedPointer, first: int, grid: Grid, row: Any) -> None:
    """Read the per-channel constants of the group that begins at an element."""
    source = simd.pointer(values)
    if grid.channels_of_group == 1:
        row[:] = source[first // grid.group % grid.channels]
    else:
        for pixel in range(0, len(row), max(grid.channels, 1)):
            for c in range(grid.channels):
                row[pixel + c] = source[c]


@simd.helper
def _read_sum(x: TypedPointer, start: int, other: Any, row: Any) -> None:
    source = simd.pointer(x)
    for i in range(len(row)):
        row[i] = other[i] + simd.widen(source[start + i])


@simd.helper
def write_activated(row: Any, activation: int, slope: Any, y: TypedPointer, start: int) -> None:
    """Write the activation of a row; ``slope`` is that of a leaky ReLU for negative inputs."""
    out = simd.pointer(y)
    if activation == 0:
        write(row, y, start)
    elif activation == 1:
        for i in range(len(row)):
            out[start + i] = simd.narrow(ZERO if row[i] < ZERO else row[i], y)
    elif activation == 2:
        for i in range(len(row)):
            out[start + i] = simd.narrow(_clamp_to_6(row[i]), y)
    elif activation == 3:
        for i in range(len(row)):
            out[start + i] = simd.narrow(row[i] / (ONE + simd.exp(-row[i])), y)
    elif activation == 5:
        for i in range(len(row)):
            out[start + i] = simd.narrow(row[i] if row[i] > ZERO else row[i] * slope, y)
    else:
        for i in range(len(row)):
            out[start + i] = simd.narrow(row[i] * _clamp_to_6(row[i] + THREE) / SIX, y)


@simd.inline
def _clamp_to_6(x: Any) -> Any:
    return ZERO if x < ZERO else SIX if x > SIX else x


@simd.helper
def write(row: Any, y: TypedPointer, start: int) -> None:
    """Write a row in the element type of y."""
    out = simd.pointer(y)
    for i in range(len(row)):
        out[start + i] = simd.narrow(row[i], y)


@simd.helper
def _accumulate(row: Any, total: Any, square: Any) -> None:
    for i in range(len(row)):
        value = np.float64(row[i])
        total[i] += value
        square[i] += value * value


@simd.helper
def sum_pixels(row: Any, sums: Any) -> None:
    """Sum the elements of each channel."""
    if len(sums) == 1:
        sums[0] = simd.total(row)
        return
    sums[:] = 0.0
    c = 0
    for i in range(len(row)):
        sums[c] += row[i]
        c = c + 1 if c + 1 < len(sums) else 0


@simd.helper
def totals(partial: Any, grid: Grid) -> Any:
    """Add the sums of all groups to sums (2, C)."""
    sums = np.zeros((2, grid.channels))
    for i in range(partial.shape[1]):
        sums[0, i % grid.channels] += partial[0, i]
        sums[1, i % grid.channels] += partial[1, i]
    return sums


@simd.helper
def read_gradient(gradient: TypedPointer, start: int, row: Any, activation: int, slope: Any, product: Any) -> None:
    """Multiply a gradient by the derivative of the activation, which at its kinks is that of PyTorch."""
    upstream = simd.pointer(gradient)
    if activation == 0:
        for i in range(len(row)):
            product[i] = simd.widen(upstream[start + i])
    elif activation == 1:
        for i in range(len(row)):
            product[i] = ZERO if row[i] <= ZERO else simd.widen(upstream[start + i])
    elif activation == 2:
        for i in range(len(row)):
            product[i] = ZERO if row[i] <= ZERO or row[i] >= SIX else simd.widen(upstream[start + i])
    elif activation == 3:
        for i in range(len(row)):
            s = simd.sigmoid(row[i])
            product[i] = simd.widen(upstream[start + i]) * (s * (ONE + row[i] * (ONE - s)))
    elif activation == 5:
        for i in range(len(row)):
            g = simd.widen(upstream[start + i])
            product[i] = g if row[i] > ZERO else g * slope
    else:
        for i in range(len(row)):
            g = simd.widen(upstream[start + i])
            product[i] = ZERO if row[i] <= -THREE else g * (row[i] / THREE + HALF) if row[i] < THREE else g


@simd.helper
def _add_gradient_of_moments(gradient: Any, row: Any, constants: Any, scale: Any) -> None:
    for i in range(len(row)):
        gradient[i] += scale * constants[1, i] + (scale + scale) * constants[2, i] * (row[i] - constants[3, i])
