"""Convolutions by the algorithm that is fastest on a CPU."""

import math

import torch
from torch import Tensor, nn

from dfkd_fast.kernels import winograd_conv2d, winograd_is_faster
from dfkd_fast.kernels.conv import col2im_conv2d, im2col_conv2d, output_size

__all__ = ["CpuConv2d", "use_cpu_convolutions"]

FEW = 2
"""Output pixels of a batch for each output channel, up to which the product was no slower (with AVX-512 and AMX, both precisions)."""


class CpuConv2d(nn.Conv2d):
    """A convolution that looks at its tensors and chooses how it is computed on a CPU.

    - 3×3 kernels in float32: :func:`~dfkd_fast.kernels.winograd_conv2d`, a quarter of the multiplications.
    - Few output pixels, deep in a network on small images: PyTorch's convolutions rearrange the weights at every call, and their
      gradient, which takes longer than the arithmetic. Here it is one product (:func:`~dfkd_fast.kernels.conv.im2col_conv2d`).
    - Few output channels in float32, an image's one or three, where PyTorch's compute many at once: see
      :func:`~dfkd_fast.kernels.conv.col2im_conv2d`.
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
        pixels = len(input) * math.prod(max(size, 0) for size in output_size(input, weight, *geometry))
        if self._is_winograds() and winograd_is_faster(input, weight, self.padding, cache_weight=self.fixed):
            return winograd_conv2d(input, weight, bias, self.padding, cache_weight=self.fixed)
        if 0 < pixels <= FEW * self.out_channels:
            output = im2col_conv2d(input.to(dtype), weight.to(dtype), *geometry)
        elif pixels and self._has_few_channels(dtype, self.padding):
            output = col2im_conv2d(input, weight, self.padding)
        else:
            return super()._conv_forward(input, weight, bias)
        return output if bias is None else output + bias.to(dtype)[:, None, None]

    def _is_winograds(self) -> bool:
        return self.kernel_size == (3, 3) and self.stride == self.dilation == (1, 1)

    def _has_few_channels(self, dtype: torch.dtype, padding: tuple[int, ...]) -> bool:
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
