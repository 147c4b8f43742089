"""Convolutions by other algorithms than PyTorch's, for shapes where these are faster on a CPU."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from .matmul import Col2im, Im2col, Pair, output_size

__all__ = ["col2im_conv2d", "im2col_conv2d", "output_size", "winograd_conv2d", "winograd_is_faster"]

FEWEST_CHANNELS = 64  # with fewer, Winograd's transforms take what the products save
FEWEST_PIXELS = 512  # with fewer output pixels in a batch, the transforms of the weights do, unless they are kept


def winograd_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, padding: tuple[int, ...] = (1, 1), *, keep: bool = False
) -> Tensor:
    """``conv2d(x, weight, bias, padding=padding)`` of stride 1 as Winograd's F(4×4, 3×3) (Lavin & Gray, arXiv 1509.09308).

    36 multiplications stand for 144, and transforms of images and weights surround them. Errors are four to nine times those
    of the direct sum in float32. Gradients are computed the same way, the gradient's own gradient by PyTorch's convolution.
    What it does not serve goes to PyTorch's convolution: other devices and dtypes, images that are not channels-last, and the
    transforms of ``torch.func`` and forward-mode differentiation.

    Args:
        x: (N, C_in, H, W).
        weight: (C_out, C_in, 3, 3), of x's dtype and device.
        bias: (C_out,), of x's dtype and device, or none.
        padding: rows and columns of zeros on each side.
        keep: keep the transformed weights, four times as many, until these change (not through ``.data``): for those of a frozen network.

    Returns:
        (N, C_out, H + 2 · padding[0] − 2, W + 2 · padding[1] − 2).

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        BackendError: the backend triton or cuda is forced, which has no kernel for this.
    """
    dispatch.check_forced("winograd_conv2d", x.device)
    _check(x, weight, bias, padding)
    if not _served(x, weight):
        return F.conv2d(x, weight, bias, padding=padding)
    from . import winograd  # compiles its transforms, so only where they are needed

    # The kernels read what is stored, which may be a number's negative.
    return winograd.Winograd.apply(x.resolve_neg(), weight.resolve_neg(), None if bias is None else bias.resolve_neg(), padding, keep)


def winograd_is_faster(x: Tensor, weight: Tensor, padding: tuple[int, ...] = (1, 1), *, keep: bool = False) -> bool:
    """Whether :func:`winograd_conv2d` serves these tensors and is faster than PyTorch's convolution (with AVX-512).

    False where a backend other than numba is forced, and of other convolutions.
    """
    if x.ndim != 4 or weight.ndim != 4 or not _is_pair(padding, 0):
        return False
    pixels = len(x) * math.prod(max(size, 0) for size in output_size(x, weight, (1, 1), padding, (1, 1)))
    return (
        _served(x, weight)
        and weight.shape[2:] == (3, 3)
        and x.numel() >= dispatch.MIN_NUMEL["winograd_conv2d"]
        and min(weight.shape[:2]) >= FEWEST_CHANNELS
        and pixels >= (1 if keep else FEWEST_PIXELS)
    )


def im2col_conv2d(x: Tensor, weight: Tensor, stride: Pair = (1, 1), padding: Pair = (0, 0), dilation: Pair = (1, 1)) -> Tensor:
    """``conv2d(x, weight, None, stride, padding, dilation)`` as one product with the windows of the input, copied into a matrix.

    For few output pixels of many channels. The windows are copied anew in the backward pass: kept, they would take kh·kw times the
    memory of x. Differentiable any number of times; on any device.

    Args:
        x: (N, C_in, H, W), best channels-last.
        weight: (C_out, C_in, kh, kw), of x's dtype and device, best channels-last.
        stride, padding, dilation: of rows and columns.

    Returns:
        (N, C_out, H_out, W_out), channels-last.

    Raises:
        ValueError: shapes or dtypes do not fit, a number is outside its range, or no output is left.
    """
    _check_shapes(x, weight, stride, padding, dilation)
    if dispatch.transforming():
        return F.conv2d(x, weight, None, stride, padding, dilation)
    return Im2col.apply(x, weight, stride, padding, dilation)


def col2im_conv2d(x: Tensor, weight: Tensor, padding: Pair = (0, 0)) -> Tensor:
    """``conv2d(x, weight, None, padding=padding)`` of stride 1: products of all input pixels with the kernel, added up shifted.

    For few output channels, of which PyTorch's convolutions compute many at once. Differentiable any number of times; on any device.

    Args:
        x: (N, C_in, H, W), best channels-last.
        weight: (C_out, C_in, kh, kw), of x's dtype and device, best channels-last.
        padding: of rows and columns, each less than the kernel's size.

    Returns:
        (N, C_out, H_out, W_out), channels-last.

    Raises:
        ValueError: shapes or dtypes do not fit, a number is outside its range, or no output is left.
    """
    _check_shapes(x, weight, (1, 1), padding, (1, 1))
    if any(pad >= size for pad, size in zip(padding, weight.shape[2:], strict=True)):
        raise ValueError(f"padding must be less than the kernel's {tuple(weight.shape[2:])}, not {padding}")
    if dispatch.transforming():
        return F.conv2d(x, weight, padding=padding)
    return Col2im.apply(x, weight, padding)


def _check_shapes(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> None:
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if not _is_pair(pair, least):
            raise ValueError(f"{name} must be two integers of at least {least}, not {pair!r}")
    if x.dtype != weight.dtype:
        raise ValueError(f"weight must be of x's dtype {x.dtype}, not {weight.dtype}")
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"x must be (N, C_in, H, W) and weight (C_out, C_in, kh, kw), not {tuple(x.shape)} and {tuple(weight.shape)}")
    if min(output_size(x, weight, stride, padding, dilation)) < 1:
        raise ValueError(f"no output is left of {tuple(x.shape[2:])} with kernel {tuple(weight.shape[2:])} and padding {padding}")


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...]) -> None:
    # The kernels read where they are told.
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(f"x must be (N, C_in, H, W) and weight (C_out, C_in, 3, 3), not {tuple(x.shape)} and {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},), not {tuple(bias.shape)}")
    device, dtype = x.device, x.dtype
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{name} must be on x's device {device}, not on {tensor.device}")
        # Autocast gives all three its own dtype.
        if tensor.dtype != dtype and not torch.is_autocast_enabled(device.type):
            raise ValueError(f"{name} must be of x's dtype {dtype}, not {tensor.dtype}")
    if not _is_pair(padding, 0) or min(output_size(x, weight, (1, 1), padding, (1, 1))) < 1:
        raise ValueError(f"padding must be two counts that leave an output of {tuple(x.shape[2:])}, not {padding}")


def _is_pair(numbers: tuple[int, ...], least: int) -> bool:
    """Whether these are two integers of at least so much; layers have names and single numbers, too."""
    pair = isinstance(numbers, tuple | list) and len(numbers) == 2
    return pair and all(isinstance(number, int) and number >= least for number in numbers)


def _served(x: Tensor, weight: Tensor) -> bool:
    """What is compiled is left to the compiler."""
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
