"""Convolution with bias, residual and ReLU of a frozen network, as one call of the library that computes convolutions."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from .. import dispatch, operators
from ..checks import differentiable_once, require_tensors, shown
from .matmul import Pair, is_pair, output_size

__all__ = ["cases_without_kernel", "conv2d_relu"]

cases_without_kernel: dict[str, str] = {}
"""Calls for which cuDNN had no kernel, and its error; they are computed by PyTorch's separate operations."""


def conv2d_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Compute ``relu(conv2d(x, weight, bias) + residual)`` of a frozen layer, on a GPU as one kernel of cuDNN.

    PyTorch adds the bias of a convolution, the residual and the ReLU in one kernel each, all of which read and write the whole output.
    The backward pass masks the gradient and computes that of the input; it keeps the output only, not the input. If cuDNN has no such
    kernel for the tensors, PyTorch's operations are used. Autocast does not apply: the output has the dtype of ``x``.

    Args:
        x: input (N, C_in, H, W).
        weight: filters (C_out, C_in / groups, kh, kw), of the dtype and device of ``x``.
        bias: bias (C_out,), likewise.
        residual: tensor of the shape, dtype and device of the output, or None.
        stride: stride of height and width.
        padding: zero padding of height and width.
        dilation: dilation of height and width.
        groups: number of groups of channels.

    Returns:
        The output (N, C_out, H_out, W_out), differentiable with respect to ``x`` and ``residual``; double backward requires the reference
        backend.

    Raises:
        ValueError: ``weight`` or ``bias`` requires a gradient, or shapes, dtypes or numbers are invalid.
        TypeError: an argument is not a tensor.
        RuntimeError: double backward.

    Examples:
        >>> import torch
        >>> from dfkd_fast.kernels import conv2d_relu
        >>> x, weight, bias = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 3, 3), torch.zeros(5)
        >>> conv2d_relu(x, weight, bias, padding=(1, 1)).shape
        torch.Size([2, 5, 8, 8])
    """
    _check(x, weight, bias, residual, stride, padding, dilation, groups)
    geometry = [*stride], [*padding], [*dilation], groups
    if dispatch.forced() == "reference" or dispatch.transforming() or x.dtype not in dispatch.KERNEL_DTYPES:
        with torch.autocast(x.device.type, enabled=False):
            y = F.conv2d(x, weight, bias, *geometry)
        return F.relu(y if residual is None else y + residual)
    return _conv_relu(x, weight, bias, residual, *geometry)


class _ConvRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *geometry: Any) -> Tensor:
        y = torch.ops.dfkd_fast.conv2d_relu(x, weight, bias, residual, *geometry)
        ctx.save_for_backward(y, weight)
        ctx.shape, ctx.geometry = x.shape, geometry
        return y

    @staticmethod
    @differentiable_once("conv2d_relu")
    def backward(ctx: Any, saved: tuple[Tensor, Tensor], gradient: Tensor) -> tuple[Tensor | None, ...]:
        y, weight = saved
        of_x, _, _, of_residual = ctx.needs_input_grad[:4]
        gradient = torch.ops.aten.threshold_backward(gradient, y, 0)
        grad_x = conv2d_input(ctx.shape, _strided_like(weight, y), gradient, *ctx.geometry) if of_x else None
        return grad_x, None, None, gradient if of_residual else None, *4 * [None]


_conv_relu = operators.differentiable(
    "conv2d_relu_autograd",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? residual, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor",
    _ConvRelu,
)


def _strided_like(weight: Tensor, y: Tensor) -> Tensor:
    """Return 1×1 filters with channels-last strides if ``y`` is channels-last.

    PyTorch chooses the memory format of the gradient by the strides of the filters. Those of 1×1 filters fit both formats, and are
    contiguous if they were never changed, so that the gradient would be transposed.
    """
    if weight.shape[2:] == (1, 1) and y.is_contiguous(memory_format=torch.channels_last):
        channels = weight.shape[1]
        return weight.contiguous().as_strided(weight.shape, (channels, 1, channels, channels))
    return weight


def _separately(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *geometry: Any) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        y = F.conv2d(x, weight, bias, *geometry)
    # In place, since nothing else has seen the result.
    return (y if residual is None else y.add_(residual)).relu_()


def _on_gpu(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *geometry: Any) -> Tensor:
    case = f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)} * {tuple(weight.shape)}, {geometry}"
    if case not in cases_without_kernel:
        try:
            if residual is None:
                return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
            return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            cases_without_kernel[case] = str(error).partition("\n")[0]
    return _separately(x, weight, bias, residual, *geometry)


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    height, width = output_size(x, weight, stride, padding, dilation)
    # The memory format that PyTorch chooses for convolutions.
    channels_last = any(tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous() for tensor in (x, weight))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((len(x), len(weight), height, width), dtype=x.dtype, device=x.device, memory_format=layout)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> None:
    others = {"weight": weight, "bias": bias} | ({} if residual is None else {"residual": residual})
    require_tensors(x=x, **others)
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups must be an integer of at least 1, not {shown(groups)}")
    for name, pair, minimum in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if not is_pair(pair, minimum):
            raise ValueError(f"{name} must be two integers of at least {minimum}, not {shown(pair)}")
    if torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad):
        raise ValueError("weight and bias must be frozen: the output is differentiable with respect to x and residual only")
    if x.ndim != 4 or weight.ndim != 4 or x.shape[1] != groups * weight.shape[1] or len(weight) % groups:
        shapes = f"{tuple(x.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"x must be (N, C_in, H, W) and weight (C_out, C_in / {groups}, kh, kw) for {groups} groups, not {shapes}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},), not {tuple(bias.shape)}")
    size = output_size(x, weight, stride, padding, dilation)
    if min(size) < 1:
        raise ValueError(f"the output is empty: input {tuple(x.shape[2:])}, kernel {tuple(weight.shape[2:])}, padding {tuple(padding)}")
    if residual is not None and residual.shape != (len(x), len(weight), *size):
        raise ValueError(f"residual must have the shape of the output, {(len(x), len(weight), *size)}, not {tuple(residual.shape)}")
    for name, tensor in others.items():
        if (tensor.dtype, tensor.device) != (x.dtype, x.device):
            raise ValueError(f"{name} must have dtype and device of x, {x.dtype} on {x.device}, not {tensor.dtype} on {tensor.device}")


operators.LIBRARY.define(
    "conv2d_relu(Tensor x, Tensor weight, Tensor bias, Tensor? residual, "
    "int[] stride, int[] padding, int[] dilation, int groups) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
operators.LIBRARY.impl("conv2d_relu", _separately, "CPU")
operators.LIBRARY.impl("conv2d_relu", _on_gpu, "CUDA")
torch.library.register_fake("dfkd_fast::conv2d_relu", _fake, lib=operators.LIBRARY)
