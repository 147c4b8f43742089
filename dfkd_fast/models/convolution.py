"""Convolutions by the algorithm that is fastest on a CPU."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast.kernels import winograd_conv2d, winograd_pays

__all__ = ["CpuConv2d", "use_cpu_convolutions"]

FEW = 2
"""Output pixels of a batch for each output channel, up to which the product was no slower (with AVX-512 and AMX, both precisions)."""
Pair = tuple[int, ...]


class CpuConv2d(nn.Conv2d):
    """A convolution that looks at its tensors and chooses how it is computed on a CPU.

    - 3×3 kernels in float32: :func:`~dfkd_fast.kernels.winograd_conv2d`, a quarter of the multiplications.
    - Few output pixels, deep in a network on small images: PyTorch's convolutions rearrange the weights at every call, and their
      gradient, which takes longer than the arithmetic. The windows of the input are copied into a matrix instead (im2col).
    - Few output channels in float32, an image's one or three, where PyTorch's compute many at once: the products of all input
      pixels with the kernel are added up shifted (col2im).
    - Everything else, and whatever is not channels-last: its base class.

    Parameters are the same, and so is the function; the rounding is not.
    """

    fixed: bool
    """Whether the weights are a frozen network's, so that what is computed from them is worth keeping."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # What is compiled stays in one graph, and is the compiler's.
        if torch.compiler.is_compiling() or isinstance(self.padding, str) or not _laid_out(input, weight):
            return super()._conv_forward(input, weight, bias)
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else weight.dtype
        if not autocast and input.dtype != weight.dtype:  # an error, and PyTorch's to say
            return super()._conv_forward(input, weight, bias)
        geometry = self.stride, self.padding, self.dilation
        pixels = len(input) * math.prod(max(size, 0) for size in _output_size(input, weight, *geometry))
        if self._is_winograds() and winograd_pays(input, weight, self.padding, keep=self.fixed):
            return winograd_conv2d(input, weight, bias, self.padding, keep=self.fixed)
        if 0 < pixels <= FEW * self.out_channels:
            output = _FewPixels.apply(input.to(dtype), weight.to(dtype), *geometry)
        elif pixels and self._has_few_channels(dtype, self.padding):
            output = _FewChannels.apply(input, weight, self.padding)
        else:
            return super()._conv_forward(input, weight, bias)
        return output if bias is None else output + bias.to(dtype)[:, None, None]

    def _is_winograds(self) -> bool:
        return self.kernel_size == (3, 3) and self.stride == self.dilation == (1, 1)

    def _has_few_channels(self, dtype: torch.dtype, padding: Pair) -> bool:
        # The terms of a sum would be rounded to bfloat16 one by one.
        exact = dtype in (torch.float32, torch.float64)
        # With more padding than that, some output pixels see no input.
        seeing = all(pad < size for pad, size in zip(padding, self.kernel_size, strict=True))
        few = self.out_channels * math.prod(self.kernel_size) <= self.in_channels
        return exact and seeing and few and self.stride == self.dilation == (1, 1) and self.kernel_size != (1, 1)


def use_cpu_convolutions(network: nn.Module) -> nn.Module:
    """Make every ordinary convolution of a network a :class:`CpuConv2d`, in place; returns the network."""
    for layer in network.modules():
        # Once more for one that already is: what was trained may be a teacher now.
        if type(layer) in (nn.Conv2d, CpuConv2d) and layer.groups == 1 and layer.padding_mode == "zeros":
            layer.__class__ = CpuConv2d
            setattr(layer, "fixed", not layer.weight.requires_grad)  # noqa: B010  # of the class it now has
    return network


def _laid_out(images: Tensor, weight: Tensor) -> bool:
    return images.ndim == 4 and images.device.type == "cpu" and weight.is_contiguous(memory_format=torch.channels_last)


class _FewPixels(torch.autograd.Function):
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
        rows = _rows(gradient)
        by_x = by_weight = None
        if ctx.needs_input_grad[0]:
            by_x = _add_windows(rows @ _matrix(weight), x, weight, *ctx.geometry)
        if ctx.needs_input_grad[1]:
            by_matrix = rows.t() @ _windows(x, weight, *ctx.geometry)
            by_weight = by_matrix.unflatten(1, (*weight.shape[2:], weight.shape[1])).permute(0, 3, 1, 2)
        return by_x, by_weight, None, None, None


class _FewChannels(torch.autograd.Function):
    """Of stride 1. x (N, C_in, H, W) and weight (C_out, C_in, kh, kw), both best channels-last; differentiable as often as wanted.

    Products are kept as planes (kh·kw·C_out, N·H·W): an image's few channels would make short rows.
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
        by_x = by_weight = None
        if ctx.needs_input_grad[0]:
            by_x = (planes.t() @ _planes(weight)).unflatten(0, (len(x), *x.shape[2:])).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[1]:
            by_weight = (planes @ _rows(x)).unflatten(0, (*weight.shape[2:], len(weight))).permute(2, 3, 0, 1)
        return by_x, by_weight, None


def _matrix(weight: Tensor) -> Tensor:
    """(C_out, kh·kw·C_in); no copy of channels-last weights."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _planes(weight: Tensor) -> Tensor:
    """(kh·kw·C_out, C_in)."""
    return weight.permute(2, 3, 0, 1).flatten(0, 2)


def _rows(x: Tensor) -> Tensor:
    """(N·H·W, C); no copy of channels-last images."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _output_size(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> tuple[int, int]:
    height, width = (
        (size + 2 * pad - spread * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, spread in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    )
    return height, width


def _windows(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """What each output pixel sees: (N·H_out·W_out, kh·kw·C_in)."""
    size = _output_size(x, weight, stride, padding, dilation)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    shifted = [padded[:, rows, columns] for rows, columns in _shifts(weight, size, stride, dilation)]
    return torch.stack(shifted, dim=3).flatten(3).flatten(0, 2)


def _add_windows(by_windows: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Gradient of x from that of its windows."""
    (batch, channels, height, width), size = x.shape, _output_size(x, weight, stride, padding, dilation)
    by_padded = by_windows.new_zeros(batch, height + 2 * padding[0], width + 2 * padding[1], channels)
    by_shifted = by_windows.unflatten(0, (batch, *size)).unflatten(3, (-1, channels)).unbind(3)
    for (rows, columns), addition in zip(_shifts(weight, size, stride, dilation), by_shifted, strict=True):
        by_padded[:, rows, columns] += addition
    return by_padded[:, padding[0] : padding[0] + height, padding[1] : padding[1] + width].permute(0, 3, 1, 2)


def _shifts(weight: Tensor, size: tuple[int, ...], stride: Pair, dilation: Pair) -> list[tuple[slice, slice]]:
    """For each place in the kernel, which of the padded input pixels lie under it."""
    rows, columns = (
        [slice(spread * i, spread * i + step * (pixels - 1) + 1, step) for i in range(kernel)]
        for kernel, pixels, step, spread in zip(weight.shape[2:], size, stride, dilation, strict=True)
    )
    return [(row, column) for row in rows for column in columns]


def _backward_shifts(x: Tensor, weight: Tensor) -> list[tuple[slice, slice]]:
    """For each place in the kernel, which of the padded output pixels see the input pixels there."""
    return _shifts(weight, x.shape[2:], (1, 1), (1, 1))[::-1]
