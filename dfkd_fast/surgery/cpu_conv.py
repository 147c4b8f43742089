"""Convolutions that select the fastest algorithm on CPUs."""

import torch
from torch import Tensor, nn

from dfkd_fast.kernels import dispatch

from .conv_selection import Convolution, fastest_algorithm

__all__ = ["CpuConv2d", "use_cpu_convolutions"]


class CpuConv2d(nn.Conv2d):
    """A ``Conv2d`` that selects its algorithm on CPUs by the shapes and dtypes of its tensors.

    The fastest one is measured in the first steps of a training (:func:`~dfkd_fast.surgery.conv_selection.fastest_algorithm`):

    - PyTorch's convolution, which is also used outside of steps, in compiled code and for tensors that are not channels-last.
    - For few output pixels, as deep in a network on small images: one matrix product
      (:func:`~dfkd_fast.kernels.conv.im2col_conv2d`). PyTorch's convolutions reorder the weights and their gradient at every call,
      which can take longer than the arithmetic.
    - For few output channels in float32, such as an image's one or three: :func:`~dfkd_fast.kernels.conv.col2im_conv2d`. PyTorch's
      convolutions compute many channels at once.
    - For 3×3 kernels in float32: :func:`~dfkd_fast.kernels.winograd_conv2d`, with a quarter of the multiplications.

    Parameters and results are those of ``Conv2d`` up to rounding.
    """

    frozen: bool
    """Whether the weights are frozen, so that transformed weights are cached."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolution = self._convolution(input, weight)
        algorithm = "pytorch" if convolution is None else fastest_algorithm(convolution)
        if convolution is None or algorithm == "pytorch":
            return super()._conv_forward(input, weight, bias)
        output = convolution.compute(algorithm, input.to(convolution.dtype), weight.to(convolution.dtype))
        return output if bias is None else output + bias.to(convolution.dtype)[:, None, None]

    def _convolution(self, input: Tensor, weight: Tensor) -> Convolution | None:
        """Returns the call's key for :func:`fastest_algorithm`; None if PyTorch's convolution must compute it."""
        # Under torch.compile, the compiler selects the algorithm and the graph must not break.
        if torch.compiler.is_compiling() or isinstance(self.padding, str) or not _is_channels_last_on_cpu(input, weight):
            return None
        if type(input) is not Tensor or dispatch.transforming():
            return None
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else weight.dtype
        if not autocast and input.dtype != weight.dtype:  # PyTorch raises the error
            return None
        of_x, of_weight = (tensor.requires_grad and torch.is_grad_enabled() for tensor in (input, weight))
        geometry = self.stride, self.padding, self.dilation
        return Convolution(tuple(input.shape), tuple(weight.shape), *geometry, dtype, of_x, of_weight, self.frozen)


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
