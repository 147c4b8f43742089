"""Convolutions that select the fastest algorithm on CPUs."""

import functools
import math

import torch
from torch import Tensor, nn

from dfkd_fast.kernels import winograd_conv2d, winograd_is_faster
from dfkd_fast.kernels.conv import col2im_conv2d, im2col_conv2d, output_size

__all__ = ["CpuConv2d", "use_cpu_convolutions"]

MAX_PIXELS_PER_CHANNEL = 2
"""Output pixels of a batch per output channel up to which the matrix product was not slower, in float32 and bfloat16, on an Intel CPU
with AVX-512 and AMX."""


@functools.cache
def has_fast_float32_matmul() -> bool:
    """Whether float32 matrix products are as fast as PyTorch's convolutions: not on AMD CPUs, for which MKL does not use AVX-512."""
    from llvmlite import binding

    return not binding.get_host_cpu_name().startswith(("znver", "bdver", "btver"))


class CpuConv2d(nn.Conv2d):
    """A ``Conv2d`` that selects its algorithm on CPUs by the shapes and dtypes of its tensors.

    - 3×3 kernels in float32: :func:`~dfkd_fast.kernels.winograd_conv2d`, with a quarter of the multiplications.
    - Few output pixels, as deep in a network on small images: one matrix product
      (:func:`~dfkd_fast.kernels.conv.im2col_conv2d`). PyTorch's convolutions reorder the weights and their gradient at every call,
      which takes longer than the arithmetic.
    - Few output channels in float32, such as an image's one or three: :func:`~dfkd_fast.kernels.conv.col2im_conv2d`. PyTorch's
      convolutions compute many channels at once.
    - Otherwise, and for tensors that are not channels-last: PyTorch's convolution; in float32 also instead of Winograd's algorithm and
      of the matrix product, unless :func:`has_fast_float32_matmul`.

    Parameters and results are those of ``Conv2d`` up to rounding.
    """

    frozen: bool
    """Whether the weights are frozen, so that transformed weights are cached."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Under torch.compile, the compiler selects the algorithm and the graph must not break.
        if torch.compiler.is_compiling() or isinstance(self.padding, str) or not _is_channels_last_on_cpu(input, weight):
            return super()._conv_forward(input, weight, bias)
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else weight.dtype
        if not autocast and input.dtype != weight.dtype:  # PyTorch raises the error
            return super()._conv_forward(input, weight, bias)
        geometry = self.stride, self.padding, self.dilation
        pixels = len(input) * math.prod(max(size, 0) for size in output_size(input, weight, *geometry))
        fast_matmul = dtype.itemsize < 4 or has_fast_float32_matmul()
        if fast_matmul and self._has_winograd_shape() and winograd_is_faster(input, weight, self.padding, cache_weight=self.frozen):
            return winograd_conv2d(input, weight, bias, self.padding, cache_weight=self.frozen)
        if fast_matmul and 0 < pixels <= MAX_PIXELS_PER_CHANNEL * self.out_channels:
            output = im2col_conv2d(input.to(dtype), weight.to(dtype), *geometry)
        elif pixels and self._has_few_channels(dtype, self.padding):
            output = col2im_conv2d(input, weight, self.padding)
        else:
            return super()._conv_forward(input, weight, bias)
        return output if bias is None else output + bias.to(dtype)[:, None, None]

    def _has_winograd_shape(self) -> bool:
        return self.kernel_size == (3, 3) and self.stride == self.dilation == (1, 1)

    def _has_few_channels(self, dtype: torch.dtype, padding: tuple[int, ...]) -> bool:
        # In bfloat16, every partial sum would be rounded.
        exact = dtype in (torch.float32, torch.float64)
        # With larger padding, some output pixels depend on no input pixel.
        small_padding = all(pad < size for pad, size in zip(padding, self.kernel_size, strict=True))
        few = self.out_channels * math.prod(self.kernel_size) <= self.in_channels
        return exact and small_padding and few and self.stride == self.dilation == (1, 1) and self.kernel_size != (1, 1)


def use_cpu_convolutions(network: nn.Module) -> nn.Module:
    """Replaces the class of every ``Conv2d`` without groups and with zero padding by :class:`CpuConv2d`, in place.

    Returns:
        The network.
    """
    for layer in network.modules():
        # CpuConv2d is included to update ``frozen``: a trained student may be a teacher now.
        if type(layer) in (nn.Conv2d, CpuConv2d) and layer.groups == 1 and layer.padding_mode == "zeros":
            layer.__class__ = CpuConv2d
            setattr(layer, "frozen", not layer.weight.requires_grad)  # noqa: B010  # an attribute of the new class
    return network


def _is_channels_last_on_cpu(images: Tensor, weight: Tensor) -> bool:
    return images.ndim == 4 and images.device.type == "cpu" and weight.is_contiguous(memory_format=torch.channels_last)
