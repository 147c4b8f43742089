"""Per-channel mean and variance of an activation, as in the BN statistics loss.

Minimum memory traffic: forward reads the activation once. Backward reads it again and writes the gradient; full is the sum of both.
Per-channel results are not counted.
"""

from functools import lru_cache, partial

import torch
from torch import Tensor

from dfkd_fast.kernels import channel_moments

from .workload import DTYPES, LAYOUTS, FunctionWorkload, parse_shape

__all__ = ["EXAMPLE", "SIZES", "workloads"]

SIZES = ("128x64x32x32", "256x512x4x4", "32x256x56x56", "128x256x56x56")
QUICK = ("256x512x4x4",)
EXAMPLE = "NxCxHxW, such as 128x64x32x32"


def workloads(kernel: str, size: str) -> list[FunctionWorkload]:
    """Return all cases of a size (N, C, H, W); empty if the size is invalid."""
    shape = parse_shape(size, 4)
    return [] if shape is None else [_workload(kernel, size, shape, dtype, layout) for dtype in DTYPES for layout in LAYOUTS]


def _workload(kernel: str, size: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> FunctionWorkload:
    activation = torch.Size(shape).numel() * dtype.itemsize
    return FunctionWorkload(
        kernel=kernel,
        variant="",
        size=size,
        dtype=dtype,
        layout=layout,
        modes=("forward", "backward", "full"),
        quick=size in QUICK and dtype == torch.float32,
        inputs=partial(_activation, shape, dtype, layout),
        outputs=("mean", "variance"),
        floors={"forward": activation, "backward": 2 * activation, "full": 3 * activation},
        eager=_eager,
        ours=_ours,
        oracle=_eager,
        differentiable=("activation",),
    )


@lru_cache(maxsize=1)
def _activation(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device) -> dict[str, Tensor]:
    values = torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device) * 2 + 0.5
    return {"activation": values.to(dtype, memory_format=LAYOUTS[layout])}


def _eager(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), correction=0)


def _ours(x: Tensor) -> tuple[Tensor, Tensor]:
    return channel_moments(x)
