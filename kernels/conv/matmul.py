"""Convolution as a matrix product with the input's patches (im2col) or as a shifted sum of matrix products (col2im)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Col2im", "Im2col", "Pair", "is_pair", "output_size"]

Pair = tuple[int, ...]


class Im2col(torch.autograd.Function):
    """Convolution of x (N, C_in, H, W) with weight (C_out, C_in, kh, kw) by im2col; supports derivatives of any order.

    The patches are recomputed in the backward pass, because storing them would take kh·kw times the memory of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = stride, padding, dilation
        product = _patches(x, weight, *ctx.geometry) @ _matrix(weight).t()
        return product.unflatten(0, (len(x), *output_size(x, weight, *ctx.geometry))).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        rows = _rows(gradient)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _fold_patches(rows @ _matrix(weight), x, weight, *ctx.geometry)
        if ctx.needs_input_grad[1]:
            grad_matrix = rows.t() @ _patches(x, weight, *ctx.geometry)
            grad_weight = grad_matrix.unflatten(1, (*weight.shape[2:], weight.shape[1])).permute(0, 3, 1, 2)
        return grad_x, grad_weight, None, None, None


class Col2im(torch.autograd.Function):
    """Convolution of stride 1 of x (N, C_in, H, W) with weight (C_out, C_in, kh, kw) by col2im; supports derivatives of any order.

    Products are stored as planes (kh·kw·C_out, N·H·W), because rows of few output channels would be short.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: Pair) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        products = (_planes(weight) @ _rows(x).t()).unflatten(1, (len(x), *x.shape[2:])).unflatten(0, (-1, len(weight)))
        (height, width), (rows, columns) = x.shape[2:], weight.shape[2:]
        total = x.new_zeros(len(weight), len(x), height + rows - 1, width + columns - 1)
        for shift, product in zip(_backward_shifts(x, weight), products, strict=True):
            total[:, :, *shift] += product
        cropped = total[:, :, rows - 1 - padding[0] : height + padding[0], columns - 1 - padding[1] : width + padding[1]]
        return cropped.transpose(0, 1).contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        vertical, horizontal = (size - 1 - pad for size, pad in zip(weight.shape[2:], ctx.padding, strict=True))
        padded = F.pad(gradient.transpose(0, 1), (horizontal, horizontal, vertical, vertical))
        planes = torch.stack([padded[:, :, *shift] for shift in _backward_shifts(x, weight)]).flatten(2).flatten(0, 1)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (planes.t() @ _planes(weight)).unflatten(0, (len(x), *x.shape[2:])).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[1]:
            grad_weight = (planes @ _rows(x)).unflatten(0, (*weight.shape[2:], len(weight))).permute(2, 3, 0, 1)
        return grad_x, grad_weight, None


def _matrix(weight: Tensor) -> Tensor:
    """Return the weight as (C_out, kh·kw·C_in), without a copy if it is channels-last."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _planes(weight: Tensor) -> Tensor:
    """Return the weight as (kh·kw·C_out, C_in)."""
    return weight.permute(2, 3, 0, 1).flatten(0, 2)


def _rows(x: Tensor) -> Tensor:
    """Return images as (N·H·W, C), without a copy if they are channels-last."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def output_size(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> tuple[int, int]:
    """Return height and width of a convolution's output; less than 1 if it is empty."""
    height, width = (
        (size + 2 * pad - spread * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, spread in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    )
    return height, width


def _patches(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Return the input patch of each output pixel, (N·H_out·W_out, kh·kw·C_in)."""
    size = output_size(x, weight, stride, padding, dilation)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    shifted = [padded[:, rows, columns] for rows, columns in _shifts(weight, size, stride, dilation)]
    return torch.stack(shifted, dim=3).flatten(3).flatten(0, 2)


def _fold_patches(grad_patches: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Return the gradient of x, given the gradient of its patches (col2im)."""
    (batch, channels, height, width), size = x.shape, output_size(x, weight, stride, padding, dilation)
    grad_padded = grad_patches.new_zeros(batch, height + 2 * padding[0], width + 2 * padding[1], channels)
    grad_shifted = grad_patches.unflatten(0, (batch, *size)).unflatten(3, (-1, channels)).unbind(3)
    for (rows, columns), grad_patch in zip(_shifts(weight, size, stride, dilation), grad_shifted, strict=True):
        grad_padded[:, rows, columns] += grad_patch
    return grad_padded[:, padding[0] : padding[0] + height, padding[1] : padding[1] + width].permute(0, 3, 1, 2)


def _shifts(weight: Tensor, size: tuple[int, ...], stride: Pair, dilation: Pair) -> list[tuple[slice, slice]]:
    """Return the slices of the padded input that each kernel element multiplies."""
    rows, columns = (
        [slice(spread * i, spread * i + step * (pixels - 1) + 1, step) for i in range(kernel)]
        for kernel, pixels, step, spread in zip(weight.shape[2:], size, stride, dilation, strict=True)
    )
    return [(row, column) for row in rows for column in columns]


def _backward_shifts(x: Tensor, weight: Tensor) -> list[tuple[slice, slice]]:
    """Return the slices of the padded output to which each kernel element contributes."""
    return _shifts(weight, x.shape[2:], (1, 1), (1, 1))[::-1]


def is_pair(numbers: object, minimum: int) -> bool:
    """Return whether ``numbers`` are two integers ≥ ``minimum``; the padding of a layer can also be a string or one number."""
    return (
        isinstance(numbers, tuple | list) and len(numbers) == 2 and all(isinstance(number, int) and number >= minimum for number in numbers)
    )
