"""3×3 convolutions with a quarter of the multiplications, for float32 on a CPU."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import dispatch

__all__ = ["winograd_conv2d", "winograd_pays"]

CHUNK = 1 << 20  # elements of the transformed images that are in work at a time: both sides of the product should stay in cache
G = (
    *((1 / 4, 0.0, 0.0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6)),
    *((1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0.0, 0.0, 1.0)),
)
FEWEST_CHANNELS = 64  # with fewer, the transforms take what the products save
FEWEST_PIXELS = 512  # with fewer output pixels in a batch, the transforms of the weights do, unless they are kept
_kept = WeakTensorKeyDictionary()


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
    # The kernels read what is stored, which may be a number's negative.
    return _Winograd.apply(x.resolve_neg(), weight.resolve_neg(), None if bias is None else bias.resolve_neg(), padding, keep)


def winograd_pays(x: Tensor, weight: Tensor, padding: tuple[int, ...] = (1, 1), *, keep: bool = False) -> bool:
    """Whether :func:`winograd_conv2d` serves these tensors and is faster than PyTorch's convolution (with AVX-512).

    False where a backend other than numba is forced, and of other convolutions.
    """
    if x.ndim != 4 or weight.ndim != 4 or not _is_padding(padding):
        return False
    height, width = _output_size(x, padding)
    pixels = len(x) * max(height, 0) * max(width, 0)
    return (
        _served(x, weight)
        and weight.shape[2:] == (3, 3)
        and x.numel() >= dispatch.WORTHWHILE["winograd_conv2d"]
        and min(weight.shape[:2]) >= FEWEST_CHANNELS
        and pixels >= (1 if keep else FEWEST_PIXELS)
    )


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
    if not _is_padding(padding) or min(_output_size(x, padding)) < 1:
        raise ValueError(f"padding must be two counts that leave an output of {tuple(x.shape[2:])}, not {padding}")


def _is_padding(padding: tuple[int, ...]) -> bool:
    """Whether these are two counts; layers have names and single numbers, too."""
    if not isinstance(padding, tuple | list) or len(padding) != 2:
        return False
    rows, columns = padding
    return isinstance(rows, int) and isinstance(columns, int) and rows >= 0 and columns >= 0


def _output_size(x: Tensor, padding: tuple[int, ...]) -> tuple[int, int]:
    return x.shape[2] + 2 * padding[0] - 2, x.shape[3] + 2 * padding[1] - 2


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
        and dispatch.why_not("numba") is None
    )


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], keep: bool) -> Tensor:
        from . import cpu

        ctx.save_for_backward(x, weight)
        ctx.padding, ctx.keep = padding, keep
        height, width = _output_size(x, padding)
        y = x.new_empty(len(x), height, width, len(weight)).permute(0, 3, 1, 2)
        grid = cpu.tiles_of(height, width)
        transformed = _transformed(weight, keep)
        offset = x.new_zeros(len(weight)) if bias is None else bias.contiguous()
        for part in _chunks(x, weight, grid):
            cpu.from_tiles(torch.bmm(cpu.to_tiles(x[part], padding, grid), transformed.transpose(1, 2)), offset, y[part], grid)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        by_bias = gradient.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        if torch.is_grad_enabled():  # to be differentiated again
            wanted = [*ctx.needs_input_grad[:2], False]
            by_x, by_weight, _ = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, [1, 1], list(ctx.padding), [1, 1], False, [0, 0], 1, wanted
            )
            return by_x, by_weight, by_bias, None, None
        gradient = gradient.contiguous(memory_format=torch.channels_last).resolve_neg()
        # One after the other: the transforms of large weights and of their gradient need not be there together.
        by_x = _by_images(x, weight, gradient, ctx.padding, ctx.keep) if ctx.needs_input_grad[0] else None
        by_weight = _by_weight(x, weight, gradient, ctx.padding) if ctx.needs_input_grad[1] else None
        return by_x, by_weight, by_bias, None, None


def _by_images(x: Tensor, weight: Tensor, gradient: Tensor, padding: tuple[int, ...], keep: bool) -> Tensor:
    from . import cpu

    grid = cpu.tiles_of(*gradient.shape[2:])
    result, transformed = torch.zeros_like(x), _transformed(weight, keep)
    for part in _chunks(x, weight, grid):
        cpu.add_tiles(torch.bmm(cpu.from_tiles_adjoint(gradient[part], grid), transformed), result[part], padding, grid)
    return result


def _by_weight(x: Tensor, weight: Tensor, gradient: Tensor, padding: tuple[int, ...]) -> Tensor:
    from . import cpu

    grid = cpu.tiles_of(*gradient.shape[2:])
    total = None
    for part in _chunks(x, weight, grid):
        factors = cpu.from_tiles_adjoint(gradient[part], grid).transpose(1, 2), cpu.to_tiles(x[part], padding, grid)
        total = torch.bmm(*factors) if total is None else total.baddbmm_(*factors)
    if total is None:  # no images
        return torch.zeros_like(weight)
    places = (_kernel_transform(weight).t() @ total.flatten(1)).unflatten(1, weight.shape[:2])
    return places.permute(1, 2, 0).unflatten(2, (3, 3)).contiguous(memory_format=torch.channels_last)


def _chunks(x: Tensor, weight: Tensor, grid: tuple[int, int]) -> Iterator[slice]:
    pieces = -(-len(x) * 36 * math.prod(grid) * max(weight.shape[:2]) // CHUNK)
    images = max(1, -(-len(x) // max(pieces, 1)))
    for start in range(0, len(x), images):
        yield slice(start, start + images)


def _transformed(weight: Tensor, keep: bool) -> Tensor:
    """G w Gᵀ of every pair of channels: (36, C_out, C_in)."""
    version, known = _kept.get(weight, (None, None))
    if known is not None and version == (weight._version, weight.data_ptr()):
        return known
    with torch.no_grad():
        places = weight.permute(2, 3, 0, 1).reshape(9, -1)
        transformed = (_kernel_transform(weight) @ places).unflatten(1, weight.shape[:2])
    if keep and not weight.is_inference():  # such a tensor does not tell that it changed
        _kept[weight] = (weight._version, weight.data_ptr()), transformed
    return transformed


def _kernel_transform(like: Tensor) -> Tensor:
    """w ↦ G w Gᵀ as one matrix, (36, 9)."""
    g = like.new_tensor(G)
    return torch.kron(g, g)
