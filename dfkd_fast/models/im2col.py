"""Convolutions over small maps as matrix products, which a CPU computes faster."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Im2colConv2d", "use_im2col"]

FEW = 2
"""Output pixels of a batch for each output channel, up to which the product was no slower (with AVX-512 and AMX, both precisions)."""


class Im2colConv2d(nn.Conv2d):
    """A convolution that copies its windows into a matrix and multiplies, where a batch has few output pixels.

    On a CPU PyTorch's convolutions rearrange the weights at every call, and their gradient. Deep in a network on small images, that
    takes longer than the arithmetic. Channels-last weights are a matrix (C_out, kh·kw·C_in) as they lie, and so is
    their gradient. Everywhere else this is its base class; parameters and results are the same.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self._multiplies(input, weight):
            return super()._conv_forward(input, weight, bias)
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        output = _Product.apply(input, weight, self.stride, self.padding, self.dilation)
        return output if bias is None else output + bias[:, None, None]

    def _multiplies(self, images: Tensor, weight: Tensor) -> bool:
        if isinstance(self.padding, str) or images.ndim != 4 or images.device.type != "cpu":
            return False
        if not weight.is_contiguous(memory_format=torch.channels_last):
            return False
        height, width = _output_size(images, weight, self.stride, self.padding, self.dilation)
        return height > 0 and width > 0 and 0 < len(images) * height * width <= FEW * self.out_channels


def use_im2col(network: nn.Module) -> nn.Module:
    """Make every ordinary convolution of a network an :class:`Im2colConv2d`, in place; returns the network."""
    for layer in network.modules():
        if type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros":
            layer.__class__ = Im2colConv2d
    return network


Pair = tuple[int, ...]


class _Product(torch.autograd.Function):
    """x (N, C_in, H, W) and weight (C_out, C_in, kh, kw), both best channels-last; differentiable as often as wanted.

    The windows are copied anew in the backward pass: kept, they would take kh·kw times the memory of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = stride, padding, dilation
        product = _windows(x, weight, *ctx.geometry) @ _matrix(weight).t()
        return product.unflatten(0, (len(x), *_output_size(x, weight, *ctx.geometry))).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        rows = gradient.permute(0, 2, 3, 1).flatten(0, 2)
        by_x = by_weight = None
        if ctx.needs_input_grad[0]:
            by_x = _add_windows(rows @ _matrix(weight), x, weight, *ctx.geometry)
        if ctx.needs_input_grad[1]:
            by_matrix = rows.t() @ _windows(x, weight, *ctx.geometry)
            by_weight = by_matrix.unflatten(1, (*weight.shape[2:], weight.shape[1])).permute(0, 3, 1, 2)
        return by_x, by_weight, None, None, None


def _matrix(weight: Tensor) -> Tensor:
    """(C_out, kh·kw·C_in); no copy of channels-last weights."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _output_size(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> tuple[int, int]:
    height, width = (
        (size + 2 * pad - spread * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, spread in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    )
    return height, width


def _windows(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """What each output pixel sees: (N·H_out·W_out, kh·kw·C_in)."""
    height, width = _output_size(x, weight, stride, padding, dilation)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    shifted = [padded[:, rows, columns] for rows, columns in _shifts(weight, (height, width), stride, dilation)]
    return torch.stack(shifted, dim=3).flatten(3).flatten(0, 2)


def _add_windows(by_windows: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Gradient of x from that of its windows."""
    (batch, channels, height, width), size = x.shape, _output_size(x, weight, stride, padding, dilation)
    by_padded = by_windows.new_zeros(batch, height + 2 * padding[0], width + 2 * padding[1], channels)
    by_shifted = by_windows.unflatten(0, (batch, *size)).unflatten(3, (-1, channels)).unbind(3)
    for (rows, columns), addition in zip(_shifts(weight, size, stride, dilation), by_shifted, strict=True):
        by_padded[:, rows, columns] += addition
    return by_padded[:, padding[0] : padding[0] + height, padding[1] : padding[1] + width].permute(0, 3, 1, 2)


def _shifts(weight: Tensor, size: tuple[int, int], stride: Pair, dilation: Pair) -> list[tuple[slice, slice]]:
    """For each place in the kernel, which of the padded pixels lie under it."""
    rows, columns = (
        [slice(spread * i, spread * i + step * (pixels - 1) + 1, step) for i in range(kernel)]
        for kernel, pixels, step, spread in zip(weight.shape[2:], size, stride, dilation, strict=True)
    )
    return [(row, column) for row in rows for column in columns]
