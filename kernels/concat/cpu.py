"""Concatenation of generated images in numba.

A task processes a tile: a range of pixels of one image in all channels, stored channel by channel. Only ``_read`` and ``_write``
depend on the strides of a tensor.
"""

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from .. import simd
from ..simd import ONE, ZERO, TypedPointer

__all__ = ["concat_backward", "concat_forward", "concat_forward_out", "concat_gradient_moments"]

ACTIVATIONS = {"none": 0, "tanh": 1, "sigmoid": 2}
TILE = 4096  # elements per tile
# Strides in elements: between images, channels and pixels.
Strides = tuple[int, int, int]
Size = tuple[int, int, int]  # images, channels, pixels


def concat_forward(
    raws: list[Tensor], activation: str, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    shape = (sum(len(raw) for raw in raws), *raws[0].shape[1:])
    out = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    _write_batch(out, raws, activation, mean, std)
    return out


def concat_forward_out(out: Tensor, raws: list[Tensor], activation: str, mean: Tensor | None, std: Tensor | None) -> None:
    if _has_uniform_pixel_stride(out):
        _write_batch(out, raws, activation, mean, std)
    else:
        out.copy_(concat_forward(raws, activation, mean, std, out.dtype, channels_last=True))


def concat_backward(
    gradient: Tensor,
    raw: Tensor,
    activation: str,
    mean: Tensor | None,
    std: Tensor | None,
    gradient_mean: Tensor | None,
    gradient_dot: Tensor | None,
) -> Tensor:
    original = raw
    gradient, raw = _with_uniform_pixel_stride(gradient), _with_uniform_pixel_stride(raw)
    out = torch.empty_like(raw)
    if not _has_uniform_pixel_stride(out):  # empty_like of an expanded tensor permutes the dimensions
        out = torch.empty(raw.shape, dtype=raw.dtype)
    affine = _stack_constants((mean, ZERO), (std, ONE), (gradient_mean, ZERO), (gradient_dot, ZERO), channels=raw.shape[1])
    with simd.threads:
        _backward(
            *map(simd.typed_pointer, (gradient, raw, out)),
            *map(_strides, (gradient, raw, out)),
            *(_size(raw), ACTIVATIONS[activation], affine, gradient_mean is not None),
        )
    return simd.restride_like(out, original)


def concat_gradient_moments(gradient: Tensor, raw: Tensor, activation: str, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    gradient, raw = _with_uniform_pixel_stride(gradient), _with_uniform_pixel_stride(raw)
    mean_out, dot_out = torch.empty(raw.shape[1]), torch.empty(raw.shape[1])
    affine = _stack_constants((mean, ZERO), (std, ONE), channels=raw.shape[1])
    with simd.threads:
        _gradient_moments(
            *map(simd.typed_pointer, (gradient, raw, mean_out, dot_out)),
            *(_strides(gradient), _strides(raw), _size(raw), ACTIVATIONS[activation], affine),
        )
    return mean_out, dot_out


def _write_batch(out: Tensor, raws: list[Tensor], activation: str, mean: Tensor | None, std: Tensor | None) -> None:
    row = 0
    for index, raw in enumerate(map(_with_uniform_pixel_stride, raws)):
        target = out[row : row + len(raw)]
        row += len(raw)
        own_mean, own_std = (None if constant is None else constant[index] for constant in (mean, std))
        affine = _stack_constants((own_mean, ZERO), (own_std, ONE), channels=raw.shape[1])
        with simd.threads:
            _forward(
                *map(simd.typed_pointer, (raw, target)),
                *(_strides(raw), _strides(target), _size(raw), ACTIVATIONS[activation], affine),
            )


def _stack_constants(*rows: tuple[Tensor | None, Any], channels: int) -> Any:
    """Return an array with one row per per-channel constant, filled with its default if it is None."""
    return np.array([np.full(channels, default) if tensor is None else tensor.numpy() for tensor, default in rows], dtype=np.float32)


def _has_uniform_pixel_stride(images: Tensor) -> bool:
    """Return whether the pixels of a channel have one stride."""
    _, _, height, width = images.shape
    return height == 1 or width == 1 or images.stride(2) == width * images.stride(3)


def _with_uniform_pixel_stride(images: Tensor) -> Tensor:
    return images if _has_uniform_pixel_stride(images) else images.contiguous()


def _strides(images: Tensor) -> Strides:
    return images.stride(0), images.stride(1), images.stride(3 if images.shape[3] > 1 else 2)


def _size(images: Tensor) -> Size:
    count, channels, height, width = images.shape
    return count, channels, height * width


@simd.parallel
def _forward(
    raw: TypedPointer, out: TypedPointer, raw_strides: Strides, out_strides: Strides, size: Size, activation: int, affine: Any
) -> None:
    raw_data, out_data = simd.pointer(raw), simd.pointer(out)
    count, channels, pixels = size
    tile_pixels = max(16, TILE // channels)
    tiles = -(-pixels // tile_pixels)
    for task in prange(count * tiles):
        image, first = task // tiles, task % tiles * tile_pixels
        tile = np.empty((channels, min(tile_pixels, pixels - first)), np.float32)
        _read(raw_data, image, first, raw_strides, tile)
        for c in range(channels):
            mean, scale = affine[0, c], ONE / affine[1, c]
            _activate(tile[c], activation)
            for p in range(tile.shape[1]):
                tile[c, p] = (tile[c, p] - mean) * scale
        _write(tile, out_data, out, image, first, out_strides)


@simd.parallel
def _backward(
    gradient: TypedPointer,
    raw: TypedPointer,
    out: TypedPointer,
    gradient_strides: Strides,
    raw_strides: Strides,
    out_strides: Strides,
    size: Size,
    activation: int,
    affine: Any,
    subtract_moments: bool,
) -> None:
    grad_data, raw_data, out_data = simd.pointer(gradient), simd.pointer(raw), simd.pointer(out)
    count, channels, pixels = size
    tile_pixels = max(16, TILE // channels)
    tiles = -(-pixels // tile_pixels)
    for task in prange(count * tiles):
        image, first = task // tiles, task % tiles * tile_pixels
        g = np.empty((channels, min(tile_pixels, pixels - first)), np.float32)
        y = np.empty((channels, min(tile_pixels, pixels - first)), np.float32)
        _read(grad_data, image, first, gradient_strides, g)
        _read(raw_data, image, first, raw_strides, y)
        for c in range(channels):
            mean, scale, g_mean, g_dot = affine[0, c], ONE / affine[1, c], affine[2, c], affine[3, c]
            _activate(y[c], activation)
            for p in range(g.shape[1]):
                slope = ONE - y[c, p] * y[c, p] if activation == 1 else y[c, p] * (ONE - y[c, p]) if activation == 2 else ONE
                correction = g_mean + (y[c, p] - mean) * scale * g_dot if subtract_moments else ZERO  # inf · 0 would be NaN
                g[c, p] = (g[c, p] - correction) * scale * slope
        _write(g, out_data, out, image, first, out_strides)


@simd.parallel
def _gradient_moments(
    gradient: TypedPointer,
    raw: TypedPointer,
    gradient_mean: TypedPointer,
    gradient_dot: TypedPointer,
    gradient_strides: Strides,
    raw_strides: Strides,
    size: Size,
    activation: int,
    affine: Any,
) -> None:
    grad_data, raw_data = simd.pointer(gradient), simd.pointer(raw)
    means, dots = simd.pointer(gradient_mean), simd.pointer(gradient_dot)
    count, channels, pixels = size
    tile_pixels = max(16, TILE // channels)
    tiles = -(-pixels // tile_pixels)
    partial = np.empty((count * tiles, 2, channels))
    for task in prange(count * tiles):
        image, first = task // tiles, task % tiles * tile_pixels
        g = np.empty((channels, min(tile_pixels, pixels - first)), np.float32)
        y = np.empty((channels, min(tile_pixels, pixels - first)), np.float32)
        _read(grad_data, image, first, gradient_strides, g)
        _read(raw_data, image, first, raw_strides, y)
        for c in range(channels):
            mean, scale = affine[0, c], ONE / affine[1, c]
            _activate(y[c], activation)
            total, dot = 0.0, 0.0
            for p in range(g.shape[1]):
                total += g[c, p]
                dot += g[c, p] * ((y[c, p] - mean) * scale)
            partial[task, 0, c], partial[task, 1, c] = total, dot
    for c in range(channels):
        total, dot = 0.0, 0.0
        for task in range(len(partial)):
            total += partial[task, 0, c]
            dot += partial[task, 1, c]
        means[c], dots[c] = np.float32(total / (count * pixels)), np.float32(dot / (count * pixels))


@simd.helper
def _activate(values: Any, activation: int) -> None:
    if activation == 1:
        for i in range(len(values)):
            values[i] = simd.tanh(values[i])
    elif activation == 2:
        for i in range(len(values)):
            values[i] = simd.sigmoid(values[i])


@simd.helper
def _read(source: Any, image: int, first: int, strides: Strides, tile: Any) -> None:
    for c in range(tile.shape[0]):
        start = image * strides[0] + c * strides[1] + first * strides[2]
        if strides[2] == 1:
            for p in range(tile.shape[1]):
                tile[c, p] = simd.widen(source[start + p])
        else:
            for p in range(tile.shape[1]):
                tile[c, p] = simd.widen(source[start + p * strides[2]])


@simd.helper
def _write(tile: Any, target: Any, typed_target: TypedPointer, image: int, first: int, strides: Strides) -> None:
    for c in range(tile.shape[0]):
        start = image * strides[0] + c * strides[1] + first * strides[2]
        if strides[2] == 1:
            for p in range(tile.shape[1]):
                target[start + p] = simd.narrow(tile[c, p], typed_target)
        else:
            for p in range(tile.shape[1]):
                target[start + p * strides[2]] = simd.narrow(tile[c, p], typed_target)
