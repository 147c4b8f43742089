"""Winograd's F(4×4, 3×3) (Lavin & Gray, arXiv 1509.09308): transforms of tiles around one batched product."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import cpu
from .matmul import output_size

__all__ = ["Winograd"]

CHUNK = 1 << 20  # elements of the transformed images that are in work at a time: both sides of the product should stay in cache
G = (
    *((1 / 4, 0.0, 0.0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6)),
    *((1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0.0, 0.0, 1.0)),
)
_kept = WeakTensorKeyDictionary()


class Winograd(torch.autograd.Function):
    """x (N, C_in, H, W) and weight (C_out, C_in, 3, 3), channels-last float32 on a CPU; the gradient's own gradient is PyTorch's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], keep: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding, ctx.keep = padding, keep
        height, width = output_size(x, weight, (1, 1), padding, (1, 1))
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
        grad_bias = gradient.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        if torch.is_grad_enabled():  # to be differentiated again
            needed = [*ctx.needs_input_grad[:2], False]
            grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, [1, 1], list(ctx.padding), [1, 1], False, [0, 0], 1, needed
            )
            return grad_x, grad_weight, grad_bias, None, None
        gradient = gradient.contiguous(memory_format=torch.channels_last).resolve_neg()
        # One after the other: the transforms of large weights and of their gradient need not be there together.
        grad_x = _grad_x(x, weight, gradient, ctx.padding, ctx.keep) if ctx.needs_input_grad[0] else None
        grad_weight = _grad_weight(x, weight, gradient, ctx.padding) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, grad_bias, None, None


def _grad_x(x: Tensor, weight: Tensor, gradient: Tensor, padding: tuple[int, ...], keep: bool) -> Tensor:
    grid = cpu.tiles_of(*gradient.shape[2:])
    result, transformed = torch.zeros_like(x), _transformed(weight, keep)
    for part in _chunks(x, weight, grid):
        cpu.add_tiles(torch.bmm(cpu.from_tiles_adjoint(gradient[part], grid), transformed), result[part], padding, grid)
    return result


def _grad_weight(x: Tensor, weight: Tensor, gradient: Tensor, padding: tuple[int, ...]) -> Tensor:
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
