"""Per-channel mean and variance of an activation, as in the BN statistics loss.

Variants: "" of one activation; "layers" of many, as of all layers of a network, in one table.

Minimum memory traffic: forward reads the activation once. Backward reads it again and writes the gradient; full is the sum of both.
Per-channel results are not counted.
"""

from functools import lru_cache, partial

import torch
from torch import Tensor

from dfkd_fast.kernels import channel_moments, combine_moments, partial_moments

from .workload import DTYPES, LAYOUTS, FunctionWorkload, parse_shape

__all__ = ["EXAMPLE", "SIZES", "workloads"]

SIZES = ("128x64x32x32", "256x512x4x4", "32x256x56x56", "128x256x56x56", "36x32x64x8x8")
QUICK = ("256x512x4x4", "36x32x64x8x8")
EXAMPLE = "NxCxHxW, such as 128x64x32x32, or LxNxCxHxW for L layers"


def workloads(kernel: str, size: str) -> list[FunctionWorkload]:
    """Return all cases of a size, (N, C, H, W) or (L, N, C, H, W) for L layers; empty if the size is invalid."""
    shape = parse_shape(size, 4) or parse_shape(size, 5)
    return [] if shape is None else [_workload(kernel, size, shape, dtype, layout) for dtype in DTYPES for layout in LAYOUTS]


def _workload(kernel: str, size: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> FunctionWorkload:
    activation = torch.Size(shape).numel() * dtype.itemsize
    names = ("activation",) if len(shape) == 4 else tuple(f"layer{index}" for index in range(shape[0]))
    return FunctionWorkload(
        kernel=kernel,
        variant="" if len(shape) == 4 else "layers",
        size=size,
        dtype=dtype,
        layout=layout,
        modes=("forward", "backward", "full"),
        quick=size in QUICK and dtype == torch.float32,
        inputs=partial(_activations, names, shape[-4:], dtype, layout),
        outputs=("mean", "variance"),
        floors={"forward": activation, "backward": 2 * activation, "full": 3 * activation},
        eager=_eager,
        ours=_ours,
        oracle=_eager,
        differentiable=names,
    )


@lru_cache(maxsize=1)
def _activations(
    names: tuple[str, ...], shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device
) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    values = (torch.randn(shape, generator=generator, device=device) * 2 + 0.5 for _ in names)
    return {name: value.to(dtype, memory_format=LAYOUTS[layout]) for name, value in zip(names, values, strict=True)}


def _eager(*layers: Tensor) -> tuple[Tensor, Tensor]:
    if len(layers) == 1:
        (x,) = layers
        return x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), correction=0)
    means, variances = zip(*map(_eager, layers), strict=True)
    return torch.stack(means), torch.stack(variances)


def _ours(*layers: Tensor) -> tuple[Tensor, Tensor]:
    if len(layers) == 1:
        return channel_moments(layers[0])
    mean, variance = combine_moments([partial_moments(x) for x in layers])
    return mean, variance
