"""Batch normalization, residual and activation in numba, in rows as in kernels/bias_act/cpu.py; see kernels/norm."""

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from .. import simd
from ..bias_act.cpu import (
    ACTIVATIONS,
    Grid,
    memory_format,
    prepared,
    read_constants,
    read_gradient,
    sum_pixels,
    totals,
    write,
    write_activated,
)
from ..simd import ZERO, TypedPointer

__all__ = [
    *("batch_norm_act_backward", "batch_norm_act_forward", "batch_norm_act_sums", "batch_norm_constants", "batch_norm_gradients"),
    "batch_norm_statistics",
]

ROWS_PER_TASK = 64  # smaller tasks would spend a third of their time on constants
MEAN, SCALE, SHIFT, COEFFICIENTS = 0, 2, 3, 4  # rows of constants; SLOPE is that of the first coefficient in the table of gradients
SLOPE = 3
LOWEST = np.finfo(np.float32).min
PIECEWISE = tuple(ACTIVATIONS[name] for name in ("none", "relu", "leaky_relu"))
"""Activations with one slope above 0 and another below it, which are computed in one loop."""


def batch_norm_constants(
    running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, input_bias: Tensor | None, eps: float
) -> Tensor:
    constants = torch.empty((4, len(running_mean)))
    constants[0] = running_mean if input_bias is None else running_mean - input_bias
    constants[1] = (running_var + eps).rsqrt()
    constants[2] = constants[1] if weight is None else constants[1] * weight
    constants[3] = 0 if bias is None else bias
    return constants


def batch_norm_statistics(
    parts: Tensor,
    center: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    input_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    count: Tensor | None,
    momentum: float | None,
    eps: float,
    elements: int,
) -> Tensor:
    constants = torch.empty((4, len(center)))
    if momentum is None:
        momentum = 0.0 if num_batches_tracked is None else 1 / float(num_batches_tracked)
    elif num_batches_tracked is not None:
        num_batches_tracked += 1
    optional = weight, bias, input_bias, running_mean, running_var
    tensors = parts.contiguous(), center, *(center if tensor is None else tensor for tensor in optional), constants
    flags = [tensor is not None for tensor in optional[:4]]
    total = float(elements if count is None else count)
    with simd.threads:
        _statistics(*map(simd.typed_pointer, tensors), *flags, float(momentum), float(eps), total, *parts.shape[1:])
    return constants


def batch_norm_act_forward(x: Tensor, constants: Tensor, residual: Tensor | None, activation: str, slope: float) -> Tensor:
    source, other, grid = prepared(x, residual, ROWS_PER_TASK)
    y = torch.empty_like(source)
    tensors = map(simd.typed_pointer, (source, other, y, constants))
    with simd.threads:
        _forward(*tensors, residual is not None, ACTIVATIONS[activation], _slope(activation, slope), grid)
    return simd.restride_like(y, x)


def batch_norm_act_sums(
    gradient: Tensor, x: Tensor, constants: Tensor, output: Tensor | None, activation: str, slope: float, blocks: int
) -> Tensor:
    source, other, grid = prepared(x, output, ROWS_PER_TASK)
    gradient = gradient.contiguous(memory_format=memory_format(x))
    sums = torch.zeros((2, x.shape[1], 2 * blocks))
    tensors = map(simd.typed_pointer, (gradient, source, other, sums, constants))
    with simd.threads:
        _sums(*tensors, output is not None, ACTIVATIONS[activation], _slope(activation, slope), blocks, grid)
    return sums


def batch_norm_gradients(sums: Tensor, constants: Tensor, count: Tensor | None, elements: int, training: bool) -> Tensor:
    table = torch.empty((5, constants.shape[1]))
    total = float(elements if count is None else count)
    with simd.threads:
        _gradients(*map(simd.typed_pointer, (sums.contiguous(), constants, table)), total, training, *sums.shape[1:])
    return table


def batch_norm_act_backward(
    gradient: Tensor,
    x: Tensor,
    constants: Tensor,
    coefficients: Tensor | None,
    output: Tensor | None,
    activation: str,
    slope: float,
    separate: bool,
) -> tuple[Tensor, Tensor]:
    source, other, grid = prepared(x, output, ROWS_PER_TASK)
    gradient = gradient.contiguous(memory_format=memory_format(x))
    grad_x = torch.empty_like(source)
    grad_residual = torch.empty_like(source) if separate else grad_x
    table = constants if coefficients is None else coefficients
    tensors = map(simd.typed_pointer, (gradient, source, other, grad_x, grad_residual, constants, table))
    flags = coefficients is not None, output is not None, separate
    with simd.threads:
        _backward(*tensors, *flags, ACTIVATIONS[activation], _slope(activation, slope), grid)
    return simd.restride_like(grad_x, x), simd.restride_like(grad_residual, x) if separate else x.new_empty(0)


def _slope(activation: str, slope: float) -> Any:
    """Return the slope for negative inputs."""
    return np.float32(1.0 if activation == "none" else slope)


@simd.parallel
def _statistics(
    parts: TypedPointer,
    center: TypedPointer,
    weight: TypedPointer,
    bias: TypedPointer,
    input_bias: TypedPointer,
    running_mean: TypedPointer,
    running_var: TypedPointer,
    constants: TypedPointer,
    has_weight: bool,
    has_bias: bool,
    has_input_bias: bool,
    has_running: bool,
    momentum: float,
    eps: float,
    count: float,
    channels: int,
    part_count: int,
) -> None:
    source, out = simd.pointer(parts), simd.pointer(constants)
    for c in prange(channels):
        offset, square = 0.0, 0.0
        for part in range(c * part_count, (c + 1) * part_count):
            offset += np.float64(source[part])
            square += np.float64(source[channels * part_count + part])
        mean = np.float64(simd.pointer(center)[c]) + offset
        variance = square - offset * offset
        if variance < 0:
            variance = 0.0
        inverse = 1 / np.sqrt(variance + eps)
        out[c], out[channels + c] = np.float32(mean), np.float32(inverse)
        out[2 * channels + c] = np.float32(inverse * simd.pointer(weight)[c] if has_weight else inverse)
        out[3 * channels + c] = simd.pointer(bias)[c] if has_bias else ZERO
        if has_running:
            shifted = mean + simd.pointer(input_bias)[c] if has_input_bias else mean
            _update(running_mean, c, momentum, shifted)
            _update(running_var, c, momentum, variance * (count / max(count - 1, 1.0)))


@simd.helper
def _update(running: TypedPointer, channel: int, momentum: float, value: float) -> None:
    data = simd.pointer(running)
    data[channel] = np.float32(data[channel] + momentum * (value - data[channel]))


@simd.parallel
def _gradients(
    sums: TypedPointer, constants: TypedPointer, table: TypedPointer, count: float, training: bool, channels: int, part_count: int
) -> None:
    source, constant, out = simd.pointer(sums), simd.pointer(constants), simd.pointer(table)
    for c in prange(channels):
        total, dot = 0.0, 0.0
        for part in range(c * part_count, (c + 1) * part_count):
            total += np.float64(source[part])
            dot += np.float64(source[channels * part_count + part])
        inverse, scale = np.float64(constant[channels + c]), np.float64(constant[2 * channels + c])
        dot *= inverse
        out[c], out[channels + c] = np.float32(dot), np.float32(total)
        out[2 * channels + c] = ZERO if training else np.float32(scale * total)
        out[3 * channels + c] = np.float32(-scale * inverse * dot / count)
        out[4 * channels + c] = np.float32(-scale * total / count)


@simd.parallel
def _forward(
    x: TypedPointer,
    residual: TypedPointer,
    y: TypedPointer,
    constants: TypedPointer,
    has_residual: bool,
    activation: int,
    slope: np.float32,
    grid: Grid,
) -> None:
    of_all = _rows_of_all(constants, grid)
    for task in prange(-(-grid.size // grid.task)):
        rows, row = _private(of_all, grid), np.empty(grid.row, np.float32)
        for first in range(task * grid.task, min((task + 1) * grid.task, grid.size), grid.group):
            _read_planes(constants, MEAN, first, grid, rows)
            end = min(first + grid.group, grid.size)
            for start in range(first, end, grid.row):
                u = row[: min(grid.row, end - start)]
                if activation in PIECEWISE:
                    _write_piecewise(x, residual, start, rows, has_residual, slope, y, len(u))
                else:
                    _read_normalized(x, start, rows, u)
                    if has_residual:
                        _add(residual, start, u)
                    write_activated(u, activation, slope, y, start)


@simd.parallel
def _sums(
    gradient: TypedPointer,
    x: TypedPointer,
    output: TypedPointer,
    sums: TypedPointer,
    constants: TypedPointer,
    from_output: bool,
    activation: int,
    slope: np.float32,
    blocks: int,
    grid: Grid,
) -> None:
    partial = np.empty((2, -(-grid.size // grid.group) * grid.channels_of_group))
    of_all = _rows_of_all(constants, grid)
    for task in prange(-(-grid.size // grid.task)):
        rows, accumulators = _private(of_all, grid), np.empty((2, grid.row), np.float32)
        u_row, g_row = np.empty(grid.row, np.float32), np.empty(grid.row, np.float32)
        for first in range(task * grid.task, min((task + 1) * grid.task, grid.size), grid.group):
            _read_planes(constants, MEAN, first, grid, rows)
            accumulators[:] = 0.0
            end = min(first + grid.group, grid.size)
            for start in range(first, end, grid.row):
                count = min(grid.row, end - start)
                if activation in PIECEWISE:
                    _accumulate_piecewise(gradient, x, output, start, rows, from_output, slope, accumulators, count)
                else:
                    u, g = u_row[:count], g_row[:count]
                    _read_before_activation(x, output, start, rows, from_output, u)
                    read_gradient(gradient, start, u, activation, slope, g)
                    _accumulate(g, x, start, rows, accumulators)
            index = first // grid.group * grid.channels_of_group
            sum_pixels(accumulators[0], partial[0, index : index + grid.channels_of_group])
            sum_pixels(accumulators[1], partial[1, index : index + grid.channels_of_group])
    both, out = totals(partial, grid), simd.pointer(sums)
    for i in range(2 * grid.channels if blocks else 0):
        value = both[i // grid.channels, i % grid.channels]
        high = np.float32(value)
        out[2 * blocks * i] = high
        out[2 * blocks * i + 1] = np.float32(value - high) if np.isfinite(high) else ZERO


@simd.parallel
def _backward(
    gradient: TypedPointer,
    x: TypedPointer,
    output: TypedPointer,
    grad_x: TypedPointer,
    grad_residual: TypedPointer,
    constants: TypedPointer,
    coefficients: TypedPointer,
    training: bool,
    from_output: bool,
    separate: bool,
    activation: int,
    slope: np.float32,
    grid: Grid,
) -> None:
    of_all = _rows_of_all(constants, grid)
    if training:
        _read_table(coefficients, SLOPE, 0, grid, of_all[COEFFICIENTS:])
    for task in prange(-(-grid.size // grid.task)):
        rows, u_row, g_row = _private(of_all, grid), np.empty(grid.row, np.float32), np.empty(grid.row, np.float32)
        for first in range(task * grid.task, min((task + 1) * grid.task, grid.size), grid.group):
            _read_planes(constants, MEAN, first, grid, rows[:COEFFICIENTS])
            if training:
                _read_planes(coefficients, SLOPE, first, grid, rows[COEFFICIENTS:])
            end = min(first + grid.group, grid.size)
            for start in range(first, end, grid.row):
                count = min(grid.row, end - start)
                if training and activation in PIECEWISE and (from_output or not separate):
                    _write_gradients_piecewise(gradient, x, output, start, rows, from_output, slope, grad_x, grad_residual, separate, count)
                else:
                    u, g = u_row[:count], g_row[:count]
                    _read_before_activation(x, output, start, rows, from_output, u)
                    read_gradient(gradient, start, u, activation, slope, g)
                    if separate:
                        write(g, grad_residual, start)
                    if training:
                        _write_gradient(g, x, start, rows, grad_x)
                    else:
                        _write_scaled(g, start, rows, grad_x)


@simd.helper
def _rows_of_all(constants: TypedPointer, grid: Grid) -> Any:
    """Return rows of mean, inverse, scale, shift, and two more; of the first plane, or in channels-last of all pixels."""
    rows = np.empty((6, grid.row), np.float32)
    _read_table(constants, MEAN, 0, grid, rows[:COEFFICIENTS])
    return rows


@simd.helper
def _private(of_all: Any, grid: Grid) -> Any:
    """Return the rows of a task: a copy if they differ between planes."""
    return of_all.copy() if grid.channels_of_group == 1 else of_all


@simd.helper
def _read_planes(table: TypedPointer, first_row: int, first: int, grid: Grid, rows: Any) -> None:
    if grid.channels_of_group == 1:
        _read_table(table, first_row, first, grid, rows)


@simd.helper
def _read_table(table: TypedPointer, first_row: int, first: int, grid: Grid, rows: Any) -> None:
    """Read consecutive rows of a table (rows, C) for the group that begins at an element."""
    for index in range(len(rows)):
        address = table[0] + 4 * (first_row + index) * grid.channels
        read_constants((address, table[1]), first, grid, rows[index])


@simd.helper
def _read_normalized(x: TypedPointer, start: int, rows: Any, row: Any) -> None:
    source = simd.pointer(x)
    for i in range(len(row)):
        row[i] = (simd.widen(source[start + i]) - rows[MEAN, i]) * rows[SCALE, i] + rows[SHIFT, i]


@simd.helper
def _add(residual: TypedPointer, start: int, row: Any) -> None:
    source = simd.pointer(residual)
    for i in range(len(row)):
        row[i] += simd.widen(source[start + i])


@simd.inline
def _piecewise(value: Any, at: Any, slope: Any) -> Any:
    """Return the value, multiplied by the slope unless ``at`` is positive."""
    return value if at > ZERO else value * slope


@simd.helper
def _write_piecewise(
    x: TypedPointer, residual: TypedPointer, start: int, rows: Any, has_residual: bool, slope: Any, y: TypedPointer, count: int
) -> None:
    source, other, out = simd.pointer(x), simd.pointer(residual), simd.pointer(y)
    lowest = LOWEST if slope == ZERO else np.float32(-np.inf)  # −∞ · 0 would be NaN
    if has_residual:
        for i in range(count):
            u = (simd.widen(source[start + i]) - rows[MEAN, i]) * rows[SCALE, i] + rows[SHIFT, i]
            u += simd.widen(other[start + i])
            out[start + i] = simd.narrow(_piecewise(lowest if u < lowest else u, u, slope), y)
    else:
        for i in range(count):
            u = (simd.widen(source[start + i]) - rows[MEAN, i]) * rows[SCALE, i] + rows[SHIFT, i]
            out[start + i] = simd.narrow(_piecewise(lowest if u < lowest else u, u, slope), y)


@simd.helper
def _accumulate_piecewise(
    gradient: TypedPointer,
    x: TypedPointer,
    output: TypedPointer,
    start: int,
    rows: Any,
    from_output: bool,
    slope: Any,
    accumulators: Any,
    count: int,
) -> None:
    upstream, source, outputs = simd.pointer(gradient), simd.pointer(x), simd.pointer(output)
    if from_output:
        for i in range(count):
            g = _piecewise(simd.widen(upstream[start + i]), simd.widen(outputs[start + i]), slope)
            accumulators[0, i] += g
            accumulators[1, i] += g * (simd.widen(source[start + i]) - rows[MEAN, i])
    else:
        for i in range(count):
            centered = simd.widen(source[start + i]) - rows[MEAN, i]
            g = _piecewise(simd.widen(upstream[start + i]), centered * rows[SCALE, i] + rows[SHIFT, i], slope)
            accumulators[0, i] += g
            accumulators[1, i] += g * centered


@simd.helper
def _write_gradients_piecewise(
    gradient: TypedPointer,
    x: TypedPointer,
    output: TypedPointer,
    start: int,
    rows: Any,
    from_output: bool,
    slope: Any,
    grad_x: TypedPointer,
    grad_residual: TypedPointer,
    separate: bool,
    count: int,
) -> None:
    upstream, source, outputs = simd.pointer(gradient), simd.pointer(x), simd.pointer(output)
    out, other = simd.pointer(grad_x), simd.pointer(grad_residual)
    if separate and from_output:
        for i in range(count):
            centered = simd.widen(source[start + i]) - rows[MEAN, i]
            g = _piecewise(simd.widen(upstream[start + i]), simd.widen(outputs[start + i]), slope)
            other[start + i] = simd.narrow(g, grad_residual)
            out[start + i] = simd.narrow(g * rows[SCALE, i] + (centered * rows[COEFFICIENTS, i] + rows[COEFFICIENTS + 1, i]), grad_x)
    elif from_output:
        for i in range(count):
            centered = simd.widen(source[start + i]) - rows[MEAN, i]
            g = _piecewise(simd.widen(upstream[start + i]), simd.widen(outputs[start + i]), slope)
            out[start + i] = simd.narrow(g * rows[SCALE, i] + (centered * rows[COEFFICIENTS, i] + rows[COEFFICIENTS + 1, i]), grad_x)
    else:
        for i in range(count):
            centered = simd.widen(source[start + i]) - rows[MEAN, i]
            g = _piecewise(simd.widen(upstream[start + i]), centered * rows[SCALE, i] + rows[SHIFT, i], slope)
            out[start + i] = simd.narrow(g * rows[SCALE, i] + (centered * rows[COEFFICIENTS, i] + rows[COEFFICIENTS + 1, i]), grad_x)


@simd.helper
def _read_before_activation(x: TypedPointer, output: TypedPointer, start: int, rows: Any, from_output: bool, row: Any) -> None:
    """Read that at which the derivative of the activation is taken."""
    if from_output:
        source = simd.pointer(output)
        for i in range(len(row)):
            row[i] = simd.widen(source[start + i])
    else:
        _read_normalized(x, start, rows, row)


@simd.helper
def _accumulate(gradient: Any, x: TypedPointer, start: int, rows: Any, accumulators: Any) -> None:
    source = simd.pointer(x)
    for i in range(len(gradient)):
        accumulators[0, i] += gradient[i]
        accumulators[1, i] += gradient[i] * (simd.widen(source[start + i]) - rows[MEAN, i])


@simd.helper
def _write_gradient(gradient: Any, x: TypedPointer, start: int, rows: Any, grad_x: TypedPointer) -> None:
    source, out = simd.pointer(x), simd.pointer(grad_x)
    for i in range(len(gradient)):
        centered = simd.widen(source[start + i]) - rows[MEAN, i]
        out[start + i] = simd.narrow(gradient[i] * rows[SCALE, i] + (centered * rows[COEFFICIENTS, i] + rows[COEFFICIENTS + 1, i]), grad_x)


@simd.helper
def _write_scaled(gradient: Any, start: int, rows: Any, grad_x: TypedPointer) -> None:
    out = simd.pointer(grad_x)
    for i in range(len(gradient)):
        out[start + i] = simd.narrow(gradient[i] * rows[SCALE, i], grad_x)
