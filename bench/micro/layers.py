"""Layers with fused kernels, channels-last: 3×3 convolution in float32 (on a CPU), and batch normalization with leaky ReLU.

Minimum memory traffic: forward reads its inputs and writes the result. Backward reads the upstream gradient and the inputs and writes
a gradient for each; full is the sum of both. Convolutions are compute-bound and far from this minimum.
"""

from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_fast.kernels import batch_norm_leaky_relu, winograd_conv2d

from .workload import DTYPES, FunctionWorkload, parse_shape

__all__ = ["EXAMPLE", "SIZES", "workloads"]

SIZES = ("16x64x32x32", "16x128x16x16", "16x256x8x8", "128x64x32x32")
QUICK = {"conv": "16x128x16x16", "norm": "128x64x32x32"}
EXAMPLE = "NxCxHxW, such as 16x128x16x16"


def workloads(kernel: str, size: str) -> list[FunctionWorkload]:
    """Return all cases of a size (N, C, H, W); convolutions have C input and output channels. Empty if the size is invalid."""
    shape = parse_shape(size, 4)
    if shape is None:
        return []
    if kernel == "conv":
        return [_convolution(size, shape)]
    return [_norm(size, shape, dtype) for dtype in DTYPES]


def _convolution(size: str, shape: tuple[int, ...]) -> FunctionWorkload:
    images, weights = 4 * torch.Size(shape).numel(), 4 * 9 * shape[1] ** 2
    return FunctionWorkload(
        kernel="conv",
        variant="",
        size=size,
        dtype=torch.float32,
        layout="channels_last",
        modes=("forward", "backward", "full"),
        quick=size == QUICK["conv"],
        inputs=partial(_images_and_weights, shape),
        outputs=("output",),
        floors={"forward": 2 * images + weights, "backward": 3 * images + 2 * weights, "full": 5 * images + 3 * weights},
        eager=partial(F.conv2d, padding=1),
        ours=winograd_conv2d,
        oracle=partial(F.conv2d, padding=1),
        differentiable=("images", "weights"),
        operation="winograd_conv2d",
    )


def _norm(size: str, shape: tuple[int, ...], dtype: torch.dtype) -> FunctionWorkload:
    activation = torch.Size(shape).numel() * dtype.itemsize
    return FunctionWorkload(
        kernel="norm",
        variant="",
        size=size,
        dtype=dtype,
        layout="channels_last",
        modes=("forward", "backward", "full"),
        quick=size == QUICK["norm"] and dtype == torch.float32,
        inputs=partial(_activation, shape, dtype),
        outputs=("output",),
        floors={"forward": 2 * activation, "backward": 3 * activation, "full": 5 * activation},
        eager=_eager_norm,
        ours=_our_norm,
        oracle=_eager_norm,
        differentiable=("activation", "gain", "offset"),
        mutated=("mean", "variance"),
        operation="batch_norm_leaky_relu",
    )


@lru_cache(maxsize=1)
def _images_and_weights(shape: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    stream = torch.Generator(device).manual_seed(0)
    images, weights = (torch.randn(size, generator=stream, device=device) for size in (shape, (shape[1], shape[1], 3, 3)))
    return {name: tensor.to(memory_format=torch.channels_last) for name, tensor in (("images", images), ("weights", weights))}


@lru_cache(maxsize=1)
def _activation(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    stream = torch.Generator(device).manual_seed(0)
    values = torch.randn(shape, generator=stream, device=device)
    # No input of the ReLU is near 0, where rounding would determine the gradient.
    gain = torch.rand(shape[1], generator=stream, device=device) * 0.3
    offset = torch.linspace(0, shape[1] - 1, shape[1], device=device).remainder(2) * 4 - 2
    moments = {"mean": torch.zeros(shape[1], device=device), "variance": torch.ones(shape[1], device=device)}
    return {"activation": values.to(dtype, memory_format=torch.channels_last), "gain": gain, "offset": offset, **moments}


def _eager_norm(x: Tensor, gain: Tensor, offset: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return F.leaky_relu(F.batch_norm(x, mean, variance, gain, offset, training=True), 0.2)


def _our_norm(x: Tensor, gain: Tensor, offset: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return batch_norm_leaky_relu(x, mean, variance, gain, offset, training=True, momentum=0.1, eps=1e-5, negative_slope=0.2)
