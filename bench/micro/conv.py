"""3×3 convolution in float32, channels-last (on a CPU).

Minimum memory traffic: forward reads its inputs and writes the result. Backward reads the upstream gradient and the inputs and writes
a gradient for each; full is the sum of both. Convolutions are compute-bound and far from this minimum.
"""

from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_fast.kernels import winograd_conv2d

from .workload import FunctionWorkload, parse_shape

__all__ = ["EXAMPLE", "SIZES", "workloads"]

SIZES = ("16x64x32x32", "16x128x16x16", "16x256x8x8", "128x64x32x32")
QUICK = "16x128x16x16"
EXAMPLE = "NxCxHxW, such as 16x128x16x16"


def workloads(kernel: str, size: str) -> list[FunctionWorkload]:
    """Return all cases of a size (N, C, H, W); convolutions have C input and output channels. Empty if the size is invalid."""
    shape = parse_shape(size, 4)
    if shape is None:
        return []
    return [_convolution(size, shape)]


def _convolution(size: str, shape: tuple[int, ...]) -> FunctionWorkload:
    images, weights = 4 * torch.Size(shape).numel(), 4 * 9 * shape[1] ** 2
    return FunctionWorkload(
        kernel="conv",
        variant="",
        size=size,
        dtype=torch.float32,
        layout="channels_last",
        modes=("forward", "backward", "full"),
        quick=size == QUICK,
        inputs=partial(_images_and_weights, shape),
        outputs=("output",),
        floors={"forward": 2 * images + weights, "backward": 3 * images + 2 * weights, "full": 5 * images + 3 * weights},
        eager=partial(F.conv2d, padding=1),
        ours=winograd_conv2d,
        oracle=partial(F.conv2d, padding=1),
        differentiable=("images", "weights"),
        operation="winograd_conv2d",
    )


@lru_cache(maxsize=1)
def _images_and_weights(shape: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    stream = torch.Generator(device).manual_seed(0)
    images, weights = (torch.randn(size, generator=stream, device=device) for size in (shape, (shape[1], shape[1], 3, 3)))
    return {name: tensor.to(memory_format=torch.channels_last) for name, tensor in (("images", images), ("weights", weights))}
