"""Winograd convolution F(4×4, 3×3) (Lavin & Gray 2016, arXiv 1509.09308): tile transforms around a batched matrix product."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import cpu
from .matmul import output_size

__all__ = ["Winograd"]

CHUNK = 1 << 20  # transformed elements processed at a time, so that both operands of the product stay in cache
G = (
    *((1 / 4, 0.0, 0.0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6)),
    *((1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0.0, 0.0, 1.0)),
)
_transform_cache = WeakTensorKeyDictionary()


class Winograd(torch.autograd.Function):
    """Convolution of channels-last float32 CPU tensors; double backward uses PyTorch's convolution."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], cache_weight: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding, ctx.cache_weight = padding, cache_weight
        height, width = output_size(x, weight, (1, 1), padding, (1, 1))
        y = x.new_empty(len(x), height, width, len(weight)).permute(0, 3, 1, 2)
        grid = cpu.tile_grid(height, width)
        transformed = _transform_weight(weight, cache_weight)
        offset = x.new_zeros(len(weight)) if bias is None else bias.contiguous()
        for part in _chunks(x, weight, grid):
            cpu.from_tiles(torch.bmm(cpu.to_tiles(x[part], padding, grid), transformed.transpose(1, 2)), offset, y[part], grid)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        grad_bias = gradient.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        if torch.is_grad_enabled():  # double backward
            needed = [*ctx.needs_input_grad[:2], False]
            grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, [1, 1], list(ctx.padding), [1, 1], False, [0, 0], 1, needed
            )
            return grad_x, grad_weight, grad_bias, None, None
        gradient = gradient.contiguous(memory_format=torch.channels_last).resolve_neg()
        # Sequentially, so that the transforms of the weight and of its gradient do not occupy memory at the same time.
        grad_x = _grad_x(x, weight, gradient, ctx.padding, ctx.cache_weight) if ctx.needs_input_grad[0] else None
        grad_weight = _grad_weight(x, weight, gradient, ctx.padding) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, grad_bias, None, None


def _grad_x(x: Tensor, weight: Tensor, gradient: Tensor, padding: tuple[int, ...], cache_weight: bool) -> Tensor:
    grid = cpu.tile_grid(*gradient.shape[2:])
    result, transformed = torch.zeros_like(x), _transform_weight(weight, cache_weight)
    for part in _chunks(x, weight, grid):
        cpu.add_tiles(torch.bmm(cpu.from_tiles_adjoint(gradient[part], grid), transformed), result[part], padding, grid)
    return result


def _grad_weight(x: Tensor, weight: Tensor, gradient: Tensor, padding: tuple[int, ...]) -> Tensor:
    grid = cpu.tile_grid(*gradient.shape[2:])
    total = None
    for part in _chunks(x, weight, grid):
        factors = cpu.from_tiles_adjoint(gradient[part], grid).transpose(1, 2), cpu.to_tiles(x[part], padding, grid)
        total = torch.bmm(*factors) if total is None else total.baddbmm_(*factors)
    if total is None:  # no images
        return torch.zeros_like(weight)
    taps = (_kernel_transform(weight).t() @ total.flatten(1)).unflatten(1, weight.shape[:2])
    return taps.permute(1, 2, 0).unflatten(2, (3, 3)).contiguous(memory_format=torch.channels_last)


def _chunks(x: Tensor, weight: Tensor, grid: tuple[int, int]) -> Iterator[slice]:
    pieces = -(-len(x) * 36 * math.prod(grid) * max(weight.shape[:2]) // CHUNK)
    images = max(1, -(-len(x) // max(pieces, 1)))
    for start in range(0, len(x), images):
        yield slice(start, start + images)


def _transform_weight(weight: Tensor, cache_weight: bool) -> Tensor:
    """Weight transform: return G w Gᵀ for every pair of channels, (36, C_out, C_in)."""
    version, cached = _transform_cache.get(weight, (None, None))
    if cached is not None and version == (weight._version, weight.data_ptr()):
        return cached
    with torch.no_grad():
        taps = weight.permute(2, 3, 0, 1).reshape(9, -1)
        transformed = (_kernel_transform(weight) @ taps).unflatten(1, weight.shape[:2])
    if cache_weight and not weight.is_inference():  # inference tensors have no version counter
        _transform_cache[weight] = (weight._version, weight.data_ptr()), transformed
    return transformed


def _kernel_transform(like: Tensor) -> Tensor:
    """Return the linear map w ↦ G w Gᵀ as a matrix (36, 9)."""
    g = like.new_tensor(G)
    return torch.kron(g, g)
