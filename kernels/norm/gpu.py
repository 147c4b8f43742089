"""Batch normalization, residual and activation in Triton, for tensors of any strides; see kernels/norm."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bias_act.gpu import apply_nonlinearity, multiply_by_derivative
from ..moments.gpu import store_split
from ..tiles import (
    channel_constant,
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
)


def batch_norm_constants(
    running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, input_bias: Tensor | None, eps: float
) -> Tensor:
    channels = len(running_mean)
    constants = running_mean.new_empty((4, channels))
    arguments = running_mean, running_var, weight, bias, input_bias, constants, float(eps), channels, 256
    launch(running_mean, _constants_kernel, (triton.cdiv(channels, 256),), *arguments)
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
    constants = center.new_empty((4, len(center)))
    tensors = parts, center, weight, bias, input_bias, running_mean, running_var, num_batches_tracked, count, constants
    numbers = -1.0 if momentum is None else float(momentum), float(eps), elements, len(center), parts.shape[2]
    launch(parts, _statistics_kernel, (triton.cdiv(len(center), 4),), *tensors, *numbers, momentum is None, 256, 4)
    return constants


def batch_norm_act_forward(x: Tensor, constants: Tensor, residual: Tensor | None, activation: str, slope: float) -> Tensor:
    y = torch.empty_like(x)
    tensors = x, x if residual is None else residual, y
    launch_tiles(_forward_kernel, tensors, constants, float(slope), residual is not None, activation)
    return y


def batch_norm_act_sums(
    gradient: Tensor, x: Tensor, constants: Tensor, output: Tensor | None, activation: str, slope: float, blocks: int
) -> Tensor:
    channels = x.shape[1]
    sums = constants.new_empty((2, channels, 2 * blocks))
    tensors = x, gradient, x if output is None else output
    sizes, strides = layout(*tensors)
    block_rows, block_channels = tile_shape(sizes, strides[0])
    arguments = *tensors, constants, sums, float(slope), output is not None, activation, *layout_arguments(sizes, tensors, strides)
    launch(x, _sums_kernel, (blocks, triton.cdiv(channels, block_channels)), *arguments, block_rows, block_channels)
    return sums


def batch_norm_gradients(sums: Tensor, constants: Tensor, count: Tensor | None, elements: int, training: bool) -> Tensor:
    channels = constants.shape[1]
    table = constants.new_empty((5, channels))
    arguments = sums, constants, count, table, elements, channels, sums.shape[2], training, 256, 4
    launch(sums, _gradients_kernel, (triton.cdiv(channels, 4),), *arguments)
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
    grad_x = torch.empty_like(x)
    grad_residual = torch.empty_like(x) if separate else grad_x
    tensors = x, gradient, x if output is None else output, grad_x, grad_residual
    launch_tiles(_backward_kernel, tensors, constants, coefficients, float(slope), output is not None, separate, activation)
    return grad_x, grad_residual if separate else x.new_empty(0)


@triton.jit
def _store_constants(
    constants: tl.tensor,
    mean: tl.tensor,
    variance: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    eps: float,
    channels: tl.tensor,
    channel_count: tl.tensor,
) -> None:
    """Store mean, inverse standard deviation, scale and shift of some channels."""
    mask = channels < channel_count
    inverse = 1 / tl.sqrt(variance + eps)
    scale = inverse
    shift = tl.zeros_like(inverse)
    if weight is not None:
        scale = inverse * tl.load(weight + channels, mask=mask)
    if bias is not None:
        shift += tl.load(bias + channels, mask=mask)
    tl.store(constants + channels, mean.to(tl.float32), mask=mask)
    tl.store(constants + channel_count + channels, inverse.to(tl.float32), mask=mask)
    tl.store(constants + 2 * channel_count + channels, scale.to(tl.float32), mask=mask)
    tl.store(constants + 3 * channel_count + channels, shift.to(tl.float32), mask=mask)


@triton.jit(do_not_specialize=["running_mean", "running_var", "weight", "bias", "input_bias", "channel_count"])
def _constants_kernel(
    running_mean: tl.tensor,
    running_var: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    input_bias: tl.tensor,
    constants: tl.tensor,
    eps: float,
    channel_count: tl.tensor,
    block_channels: tl.constexpr,
) -> None:
    channels = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    mask = channels < channel_count
    mean = tl.load(running_mean + channels, mask=mask)
    if input_bias is not None:
        mean -= tl.load(input_bias + channels, mask=mask)
    variance = tl.load(running_var + channels, mask=mask, other=1).to(tl.float64)
    _store_constants(constants, mean, variance, weight, bias, eps, channels, channel_count)


@triton.jit
def _summed(parts: tl.tensor, channels: tl.tensor, channel_count: tl.tensor, part_count: tl.tensor, block_parts: tl.constexpr) -> tl.tensor:
    """Add the parts (2, C, part_count) of some channels in a fixed order; returns two float64 sums."""
    mask = (channels < channel_count)[:, None]
    first = tl.zeros((channels.shape[0], block_parts), tl.float64)
    second = first
    for begin in range(0, part_count, block_parts):
        part = begin + tl.arange(0, block_parts)
        part_mask = mask & (part < part_count)[None, :]
        source = parts + channels.to(tl.int64)[:, None] * part_count + part[None, :]
        first += tl.load(source, mask=part_mask, other=0).to(tl.float64)
        second += tl.load(source + channel_count.to(tl.int64) * part_count, mask=part_mask, other=0).to(tl.float64)
    return tl.sum(first, axis=1), tl.sum(second, axis=1)


@triton.jit(
    do_not_specialize=[
        *("parts", "center", "weight", "bias", "input_bias", "running_mean", "running_var", "num_batches_tracked", "count"),
        *("elements", "channel_count", "part_count"),
    ]
)
def _statistics_kernel(
    parts: tl.tensor,
    center: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    input_bias: tl.tensor,
    running_mean: tl.tensor,
    running_var: tl.tensor,
    num_batches_tracked: tl.tensor,
    count: tl.tensor,
    constants: tl.tensor,
    momentum: float,
    eps: float,
    elements: tl.tensor,
    channel_count: tl.tensor,
    part_count: tl.tensor,
    cumulative: tl.constexpr,
    block_parts: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    channels = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    mask = channels < channel_count
    offset, square = _summed(parts, channels, channel_count, part_count, block_parts)
    mean = tl.load(center + channels, mask=mask).to(tl.float64) + offset
    variance = square - offset * offset
    variance = tl.where(variance < 0, 0, variance)
    _store_constants(constants, mean, variance, weight, bias, eps, channels, channel_count)
    weight_of_batch = tl.full((), 0, tl.float64) + momentum
    if num_batches_tracked is not None:
        if cumulative:
            weight_of_batch = 1 / tl.load(num_batches_tracked).to(tl.float64)
        elif tl.program_id(0) == 0:
            tl.store(num_batches_tracked, tl.load(num_batches_tracked) + 1)
    if running_mean is not None:
        total = elements.to(tl.float64)
        if count is not None:
            total = tl.load(count)
        if input_bias is not None:
            mean += tl.load(input_bias + channels, mask=mask)
        before = tl.load(running_mean + channels, mask=mask).to(tl.float64)
        tl.store(running_mean + channels, (before + weight_of_batch * (mean - before)).to(tl.float32), mask=mask)
        unbiased = variance * (total / tl.where(total > 1, total - 1, 1))
        before = tl.load(running_var + channels, mask=mask).to(tl.float64)
        tl.store(running_var + channels, (before + weight_of_batch * (unbiased - before)).to(tl.float32), mask=mask)


@triton.jit
def _normalize(x: tl.tensor, constants: tl.tensor, channels: tl.tensor, sizes: tl.tuple) -> tl.tensor:
    """Return the normalized values, and the differences from the mean."""
    mask = channels < sizes[3]
    centered = x - channel_constant(constants, channels, mask)
    scale = channel_constant(constants + 2 * sizes[3].to(tl.int64), channels, mask)
    return centered * scale + channel_constant(constants + 3 * sizes[3].to(tl.int64), channels, mask), centered


@triton.jit(do_not_specialize=["x", "residual", "y"])
def _forward_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    y: tl.tensor,
    constants: tl.tensor,
    slope: float,
    has_residual: tl.constexpr,
    activation: tl.constexpr,
    sizes: tl.tuple,
    strides: tl.tuple,
    residual_strides: tl.tuple,
    y_strides: tl.tuple,
    accesses: tl.constexpr,
    block_rows: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    sizes, group, rows, channels, mask = program_tile(sizes, accesses, block_rows, block_channels)
    u, _ = _normalize(load(pointers(x, group, rows, channels, sizes, strides, accesses, 0), mask), constants, channels, sizes)
    if has_residual:
        u += load(pointers(residual, group, rows, channels, sizes, residual_strides, accesses, 1), mask)
    store(pointers(y, group, rows, channels, sizes, y_strides, accesses, 2), apply_nonlinearity(u, activation, slope), mask)


@triton.jit(do_not_specialize=["x", "gradient", "output"])
def _sums_kernel(
    x: tl.tensor,
    gradient: tl.tensor,
    output: tl.tensor,
    constants: tl.tensor,
    sums: tl.tensor,
    slope: float,
    from_output: tl.constexpr,
    activation: tl.constexpr,
    sizes: tl.tuple,
    strides: tl.tuple,
    gradient_strides: tl.tuple,
    output_strides: tl.tuple,
    accesses: tl.constexpr,
    block_rows: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    sizes = decode_sizes(sizes, accesses)
    channels = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    channel_mask = channels < sizes[3]
    total = tl.zeros((block_rows, block_channels), tl.float32)
    dot = total
    for index in range(tl.program_id(0), sizes[0] * sizes[1] * tl.cdiv(sizes[2], block_rows), tl.num_programs(0)):
        group, rows = tile_rows(index, sizes, block_rows)
        mask = (rows < sizes[2])[:, None] & channel_mask[None, :]
        values = load(pointers(x, group, rows, channels, sizes, strides, accesses, 0), mask)
        u, centered = _normalize(values, constants, channels, sizes)
        if from_output:
            u = load(pointers(output, group, rows, channels, sizes, output_strides, accesses, 2), mask)
        g = load(pointers(gradient, group, rows, channels, sizes, gradient_strides, accesses, 1), mask)
        g = multiply_by_derivative(g, u, activation, slope)
        total += g
        dot += tl.where(mask, g * centered, 0)
    parts = 2 * tl.num_programs(0)
    target = sums + channels.to(tl.int64) * parts + 2 * tl.program_id(0)
    store_split(target, tl.sum(total.to(tl.float64), axis=0), channel_mask)
    store_split(target + sizes[3].to(tl.int64) * parts, tl.sum(dot.to(tl.float64), axis=0), channel_mask)


@triton.jit(do_not_specialize=["sums", "constants", "count", "elements", "channel_count", "part_count"])
def _gradients_kernel(
    sums: tl.tensor,
    constants: tl.tensor,
    count: tl.tensor,
    table: tl.tensor,
    elements: tl.tensor,
    channel_count: tl.tensor,
    part_count: tl.tensor,
    training: tl.constexpr,
    block_parts: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    channels = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    mask = channels < channel_count
    total, dot = _summed(sums, channels, channel_count, part_count, block_parts)
    inverse = tl.load(constants + channel_count + channels, mask=mask).to(tl.float64)
    scale = tl.load(constants + 2 * channel_count + channels, mask=mask).to(tl.float64)
    n = elements.to(tl.float64)
    if count is not None:
        n = tl.load(count)
    dot *= inverse
    of_input_bias = scale * total
    if training:
        of_input_bias = tl.zeros_like(total)
    tl.store(table + channels, dot.to(tl.float32), mask=mask)
    tl.store(table + channel_count + channels, total.to(tl.float32), mask=mask)
    tl.store(table + 2 * channel_count + channels, of_input_bias.to(tl.float32), mask=mask)
    tl.store(table + 3 * channel_count + channels, (-scale * inverse * dot / n).to(tl.float32), mask=mask)
    tl.store(table + 4 * channel_count + channels, (-scale * total / n).to(tl.float32), mask=mask)


@triton.jit(do_not_specialize=["x", "gradient", "output", "grad_x", "grad_residual"])
def _backward_kernel(
    x: tl.tensor,
    gradient: tl.tensor,
    output: tl.tensor,
    grad_x: tl.tensor,
    grad_residual: tl.tensor,
    constants: tl.tensor,
    coefficients: tl.tensor,
    slope: float,
    from_output: tl.constexpr,
    separate: tl.constexpr,
    activation: tl.constexpr,
    sizes: tl.tuple,
    strides: tl.tuple,
    gradient_strides: tl.tuple,
    output_strides: tl.tuple,
    grad_x_strides: tl.tuple,
    grad_residual_strides: tl.tuple,
    accesses: tl.constexpr,
    block_rows: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    sizes, group, rows, channels, mask = program_tile(sizes, accesses, block_rows, block_channels)
    channel_mask = channels < sizes[3]
    plane = sizes[3].to(tl.int64)
    values = load(pointers(x, group, rows, channels, sizes, strides, accesses, 0), mask)
    u, centered = _normalize(values, constants, channels, sizes)
    if from_output:
        u = load(pointers(output, group, rows, channels, sizes, output_strides, accesses, 2), mask)
    g = load(pointers(gradient, group, rows, channels, sizes, gradient_strides, accesses, 1), mask)
    g = multiply_by_derivative(g, u, activation, slope)
    if separate:
        store(pointers(grad_residual, group, rows, channels, sizes, grad_residual_strides, accesses, 4), g, mask)
    result = g * channel_constant(constants + 2 * plane, channels, channel_mask)
    if coefficients is not None:
        result += centered * channel_constant(coefficients + 3 * plane, channels, channel_mask)
        result += channel_constant(coefficients + 4 * plane, channels, channel_mask)
    store(pointers(grad_x, group, rows, channels, sizes, grad_x_strides, accesses, 3), result, mask)
