"""Bias, residual, activation and partial moments in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..moments.gpu import store_parts
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


def bias_act_forward(x: Tensor, bias: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """See kernels/bias_act."""
    y = torch.empty_like(x)
    launch_tiles(_forward_kernel, (x, x if residual is None else residual, y), bias, residual is not None, activation)
    return y


def bias_act_moments_forward(
    x: Tensor, bias: Tensor, residual: Tensor | None, activation: str, blocks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See kernels/bias_act."""
    channels = x.shape[1]
    y, center = torch.empty_like(x), torch.empty_like(bias)
    sums = x.new_empty((2, channels, 2 * blocks), dtype=torch.float32)
    tensors = x, x if residual is None else residual, y
    sizes, strides = layout(*tensors)
    block_rows, block_channels = tile_shape(sizes, strides[0])
    arguments = *tensors, bias, sums, center, residual is not None, activation, *layout_arguments(sizes, tensors, strides)
    launch(x, _moments_kernel, (blocks, triton.cdiv(channels, block_channels)), *arguments, block_rows, block_channels)
    return y, sums, center


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
    """See kernels/bias_act."""
    grad_x = torch.empty_like(x)
    grad_residual = torch.empty_like(x) if separate else grad_x
    tensors = x, x if residual is None else residual, gradient, grad_x, grad_residual
    launch_tiles(
        _backward_kernel, tensors, bias, grad_mean, grad_variance, center, float(scale), residual is not None, separate, activation
    )
    return grad_x, grad_residual if separate else x.new_empty(0)


@triton.jit
def apply_nonlinearity(u: tl.tensor, activation: tl.constexpr, slope: float) -> tl.tensor:
    """Return the activation of u; ``slope`` is that of a leaky ReLU for negative inputs."""
    y = u
    if activation == "relu":
        y = tl.where(u < 0, 0.0, u)
    elif activation == "leaky_relu":
        y = tl.where(u > 0, u, u * slope)
    elif activation == "relu6":
        y = _clamp_to_6(u)
    elif activation == "silu":
        y = u / (1 + tl.exp(-u))
    elif activation == "hardswish":
        y = u * _clamp_to_6(u + 3) / 6
    return y


@triton.jit
def _clamp_to_6(x: tl.tensor) -> tl.tensor:
    """Clamp to [0, 6]; NaN remains NaN."""
    return tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x))


@triton.jit
def multiply_by_derivative(gradient: tl.tensor, u: tl.tensor, activation: tl.constexpr, slope: float) -> tl.tensor:
    """Multiply a gradient by the derivative of the activation, which at its kinks is that of PyTorch."""
    product = gradient
    if activation == "relu":
        product = tl.where(u <= 0, 0.0, gradient)
    elif activation == "leaky_relu":
        product = tl.where(u > 0, gradient, gradient * slope)
    elif activation == "relu6":
        product = tl.where((u <= 0) | (u >= 6), 0.0, gradient)
    elif activation == "silu":
        sigmoid = 1 / (1 + tl.exp(-u))
        product = gradient * (sigmoid * (1 + u * (1 - sigmoid)))
    elif activation == "hardswish":
        product = tl.where(u <= -3, 0.0, tl.where(u < 3, gradient * (u / 3 + 0.5), gradient))
    return product


@triton.jit(do_not_specialize=["x", "residual", "y"])
def _forward_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    y: tl.tensor,
    bias: tl.tensor,
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
    u = load(pointers(x, group, rows, channels, sizes, strides, accesses, 0), mask) + channel_constant(bias, channels, channels < sizes[3])
    if has_residual:
        u += load(pointers(residual, group, rows, channels, sizes, residual_strides, accesses, 1), mask)
    store(pointers(y, group, rows, channels, sizes, y_strides, accesses, 2), apply_nonlinearity(u, activation, 0.0), mask)


@triton.jit
def _pivot(x: tl.tensor, bias: tl.tensor, channels: tl.tensor, mask: tl.tensor, stride: tl.tensor) -> tl.tensor:
    """Return the first x + bias of each channel, the shift of the sums: unshifted sums of squares would cancel."""
    first = tl.load(x + channels.to(tl.int64) * stride, mask=mask, other=0).to(tl.float32) + tl.load(bias + channels, mask=mask, other=0)
    return tl.where(tl.abs(first) < float("inf"), first, 0)


@triton.jit(do_not_specialize=["x", "residual", "y"])
def _moments_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    y: tl.tensor,
    bias: tl.tensor,
    sums: tl.tensor,
    center: tl.tensor,
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
    sizes = decode_sizes(sizes, accesses)
    channels = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    channel_mask = channels < sizes[3]
    pivot = _pivot(x, bias, channels, channel_mask, strides[3] // -2)
    b = channel_constant(bias, channels, channel_mask)
    total = tl.zeros((block_rows, block_channels), tl.float32)
    square = total
    for index in range(tl.program_id(0), sizes[0] * sizes[1] * tl.cdiv(sizes[2], block_rows), tl.num_programs(0)):
        group, rows = tile_rows(index, sizes, block_rows)
        mask = (rows < sizes[2])[:, None] & channel_mask[None, :]
        u = load(pointers(x, group, rows, channels, sizes, strides, accesses, 0), mask) + b
        centered = tl.where(mask, u - pivot[None, :], 0)
        total += centered
        square += centered * centered
        if has_residual:
            u += load(pointers(residual, group, rows, channels, sizes, residual_strides, accesses, 1), mask)
        store(pointers(y, group, rows, channels, sizes, y_strides, accesses, 2), apply_nonlinearity(u, activation, 0.0), mask)
    store_parts(sums, center, pivot, total, square, channels, sizes)


@triton.jit(do_not_specialize=["x", "residual", "gradient", "grad_x", "grad_residual"])
def _backward_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    gradient: tl.tensor,
    grad_x: tl.tensor,
    grad_residual: tl.tensor,
    bias: tl.tensor,
    grad_mean: tl.tensor,
    grad_variance: tl.tensor,
    center: tl.tensor,
    scale: float,
    has_residual: tl.constexpr,
    separate: tl.constexpr,
    activation: tl.constexpr,
    sizes: tl.tuple,
    strides: tl.tuple,
    residual_strides: tl.tuple,
    gradient_strides: tl.tuple,
    grad_x_strides: tl.tuple,
    grad_residual_strides: tl.tuple,
    accesses: tl.constexpr,
    block_rows: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    sizes, group, rows, channels, mask = program_tile(sizes, accesses, block_rows, block_channels)
    channel_mask = channels < sizes[3]
    u = load(pointers(x, group, rows, channels, sizes, strides, accesses, 0), mask) + channel_constant(bias, channels, channel_mask)
    correction = tl.zeros((block_rows, block_channels), tl.float32)
    if grad_mean is not None:
        centered = u - channel_constant(center, channels, channel_mask)
        offset, slope = channel_constant(grad_mean, channels, channel_mask), channel_constant(grad_variance, channels, channel_mask)
        correction = scale * offset + (2 * scale * slope) * centered
    if has_residual:
        u += load(pointers(residual, group, rows, channels, sizes, residual_strides, accesses, 1), mask)
    g = load(pointers(gradient, group, rows, channels, sizes, gradient_strides, accesses, 2), mask)
    g = multiply_by_derivative(g, u, activation, 0.0)
    if separate:
        store(pointers(grad_residual, group, rows, channels, sizes, grad_residual_strides, accesses, 4), g, mask)
    store(pointers(grad_x, group, rows, channels, sizes, grad_x_strides, accesses, 3), g + correction, mask)
