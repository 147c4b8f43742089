"""Convolutions of frozen networks with what follows them, and algorithms that are faster than PyTorch's on a CPU for some shapes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..checks import require_bools, require_tensors, shown
from ..renamed import renamed_argument
from .matmul import Col2im, Im2col, Pair, is_pair, output_size
from .relu import cases_without_kernel, conv2d_relu

__all__ = ["cases_without_kernel", "col2im_conv2d", "conv2d_relu", "im2col_conv2d", "output_size", "winograd_conv2d", "winograd_is_faster"]

MIN_CHANNELS = 64  # with fewer, the Winograd transforms take longer than the matrix product saves
MIN_OUTPUT_PIXELS = 512  # with fewer per batch, the weight transform takes longer than the product saves, unless it is cached


@renamed_argument("keep", "cache_weight")
def winograd_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, padding: tuple[int, ...] = (1, 1), *, cache_weight: bool = False
) -> Tensor:
    """Compute a 3×3 convolution of stride 1 with Winograd's algorithm F(4×4, 3×3) (Lavin & Gray 2016, arXiv 1509.09308).

    Drop-in replacement for ``torch.nn.functional.conv2d(x, weight, bias, padding=padding)``. It needs 36 multiplications per 4×4
    output tile and channel pair instead of 144; the rounding error is four to nine times that of direct convolution in float32.
    The backward pass uses the same algorithm, double backward uses PyTorch's convolution. PyTorch's convolution also computes
    what the kernels do not support: other devices and dtypes, inputs that are not channels-last, ``torch.func`` transforms,
    forward-mode derivatives and compiled code.

    Args:
        x: input (N, C_in, H, W).
        weight: filters (C_out, C_in, 3, 3), of the dtype and device of ``x``.
        bias: optional bias (C_out,), of the dtype and device of ``x``.
        padding: zero padding of height and width.
        cache_weight: cache the transformed weight, which takes four times the memory of ``weight``, until ``weight`` is modified
            in place; changes through ``.data`` are not detected. Useful for frozen networks.

    Returns:
        The output (N, C_out, H + 2·padding[0] − 2, W + 2·padding[1] − 2).

    Raises:
        ValueError: invalid shapes, dtypes, devices or padding.
        TypeError: an argument is not a tensor.
        BackendError: the backend triton or cuda is forced, which have no kernel for this operation.

    Examples:
        >>> import torch
        >>> from dfkd_fast.kernels import winograd_conv2d
        >>> x = torch.randn(2, 64, 16, 16).to(memory_format=torch.channels_last)
        >>> winograd_conv2d(x, torch.randn(128, 64, 3, 3)).shape
        torch.Size([2, 128, 16, 16])
    """
    _check(x, weight, bias, padding)
    require_bools(cache_weight=cache_weight)
    dispatch.check_forced("winograd_conv2d", x.device)
    if not _supports(x, weight):
        return F.conv2d(x, weight, bias, padding=padding)
    from . import winograd  # importing it compiles kernels

    # Kernels read memory directly and ignore the negative bit.
    return winograd.Winograd.apply(
        x.resolve_neg(), weight.resolve_neg(), None if bias is None else bias.resolve_neg(), padding, cache_weight
    )


@renamed_argument("keep", "cache_weight")
def winograd_is_faster(x: Tensor, weight: Tensor, padding: tuple[int, ...] = (1, 1), *, cache_weight: bool = False) -> bool:
    """Return whether ``winograd_conv2d`` is expected to be faster than PyTorch's convolution (thresholds measured with AVX-512).

    Args:
        x: input (N, C_in, H, W).
        weight: filters (C_out, C_in, kh, kw).
        padding: zero padding of height and width.
        cache_weight: whether the transformed weight is cached, which lowers the threshold.

    Returns:
        False if the kernels do not support the tensors, if another backend than numba is forced, or if the filters are not 3×3.

    Raises:
        TypeError: an argument is not a tensor.
    """
    require_tensors(x=x, weight=weight)
    if x.ndim != 4 or weight.ndim != 4 or not is_pair(padding, 0):
        return False
    pixels = len(x) * math.prod(max(size, 0) for size in output_size(x, weight, (1, 1), padding, (1, 1)))
    return (
        _supports(x, weight)
        and weight.shape[2:] == (3, 3)
        and x.numel() >= dispatch.MIN_NUMEL["winograd_conv2d"]
        and min(weight.shape[:2]) >= MIN_CHANNELS
        and pixels >= (1 if cache_weight else MIN_OUTPUT_PIXELS)
    )


def im2col_conv2d(x: Tensor, weight: Tensor, stride: Pair = (1, 1), padding: Pair = (0, 0), dilation: Pair = (1, 1)) -> Tensor:
    """Compute ``conv2d(x, weight, None, stride, padding, dilation)`` with im2col: one matrix product with the input's patches.

    Efficient for many channels and few output pixels. The patches are recomputed in the backward pass, because storing them would
    take kh·kw times the memory of ``x``. Supports any device and derivatives of any order.

    Args:
        x: input (N, C_in, H, W), preferably channels-last.
        weight: filters (C_out, C_in, kh, kw), of the dtype and device of ``x``, preferably channels-last.
        stride: stride of height and width.
        padding: zero padding of height and width.
        dilation: dilation of height and width.

    Returns:
        The output (N, C_out, H_out, W_out), channels-last.

    Raises:
        ValueError: invalid shapes, dtypes or numbers, or an empty output.
        TypeError: an argument is not a tensor.
    """
    _check_shapes(x, weight, stride, padding, dilation)
    if dispatch.transforming():
        return F.conv2d(x, weight, None, stride, padding, dilation)
    return Im2col.apply(x, weight, stride, padding, dilation)


def col2im_conv2d(x: Tensor, weight: Tensor, padding: Pair = (0, 0)) -> Tensor:
    """Compute ``conv2d(x, weight, None, padding=padding)`` with col2im: one matrix product per input pixel, then a shifted sum.

    Efficient for few output channels, for which PyTorch's convolutions are not optimized. Supports any device and derivatives of
    any order.

    Args:
        x: input (N, C_in, H, W), preferably channels-last.
        weight: filters (C_out, C_in, kh, kw), of the dtype and device of ``x``, preferably channels-last.
        padding: zero padding of height and width, less than kh and kw.

    Returns:
        The output (N, C_out, H_out, W_out), channels-last.

    Raises:
        ValueError: invalid shapes, dtypes or numbers, or an empty output.
        TypeError: an argument is not a tensor.
    """
    _check_shapes(x, weight, (1, 1), padding, (1, 1))
    if any(pad >= size for pad, size in zip(padding, weight.shape[2:], strict=True)):
        raise ValueError(f"padding must be less than the kernel's {tuple(weight.shape[2:])}, not {padding}")
    if dispatch.transforming():
        return F.conv2d(x, weight, padding=padding)
    return Col2im.apply(x, weight, padding)


def _check_shapes(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> None:
    require_tensors(x=x, weight=weight)
    for name, pair, minimum in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if not is_pair(pair, minimum):
            raise ValueError(f"{name} must be two integers of at least {minimum}, not {shown(pair)}")
    if x.dtype != weight.dtype:
        raise ValueError(f"weight must have the dtype of x, {x.dtype}, not {weight.dtype}")
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"x must be (N, C_in, H, W) and weight (C_out, C_in, kh, kw), not {tuple(x.shape)} and {tuple(weight.shape)}")
    if min(output_size(x, weight, stride, padding, dilation)) < 1:
        raise ValueError(f"the output is empty: input {tuple(x.shape[2:])}, kernel {tuple(weight.shape[2:])}, padding {padding}")


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...]) -> None:
    # Kernels do not check shapes, devices or dtypes.
    require_tensors(x=x, weight=weight)
    if bias is not None:
        require_tensors(bias=bias)
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(f"x must be (N, C_in, H, W) and weight (C_out, C_in, 3, 3), not {tuple(x.shape)} and {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},), not {tuple(bias.shape)}")
    device, dtype = x.device, x.dtype
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{name} must be on the device of x, {device}, not on {tensor.device}")
        # Autocast converts all three to its own dtype.
        if tensor.dtype != dtype and not torch.is_autocast_enabled(device.type):
            raise ValueError(f"{name} must have the dtype of x, {dtype}, not {tensor.dtype}")
    if not is_pair(padding, 0) or min(output_size(x, weight, (1, 1), padding, (1, 1))) < 1:
        raise ValueError(f"padding must be two integers ≥ 0 with a non-empty output for input {tuple(x.shape[2:])}, not {shown(padding)}")


def _supports(x: Tensor, weight: Tensor) -> bool:
    """Return whether the kernels support these tensors; compiled code is left to the compiler."""
    return (
        not torch.compiler.is_compiling()
        and not dispatch.transforming()
        and x.device.type == "cpu"
        and type(x) is Tensor
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x.is_contiguous(memory_format=torch.channels_last)
        and dispatch.forced() in (None, "numba")
        and dispatch.unavailable_reason("numba") is None
    )
