"""What follows a convolution with a folded batch norm: bias, residual and ReLU, and the moments of the BN statistics loss.

Variants: "relu"; "residual" adds the residual before it; "moments" computes the mean and variance of the input plus bias, too.

Minimum memory traffic: forward reads its inputs and writes the result. Backward reads the upstream gradient and the inputs, and writes one
gradient, which is also that of the residual; full is the sum of both. Per-channel tensors are not counted.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from dfkd_fast.kernels import bias_act, combine_moments

from .workload import DTYPES, LAYOUTS, FunctionWorkload, parse_shape

__all__ = ["EXAMPLE", "SIZES", "workloads"]

SIZES = ("128x64x32x32", "256x512x4x4", "128x256x28x28")
QUICK = ("128x64x32x32",)
EXAMPLE = "NxCxHxW, such as 128x64x32x32"
VARIANTS = ("relu", "residual", "moments")


def workloads(kernel: str, size: str) -> list[FunctionWorkload]:
    """Return all cases of a size (N, C, H, W); empty if the size is invalid."""
    shape = parse_shape(size, 4)
    if shape is None:
        return []
    return [_workload(kernel, variant, size, shape, dtype, layout) for variant in VARIANTS for dtype in DTYPES for layout in LAYOUTS]


def _workload(kernel: str, variant: str, size: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> FunctionWorkload:
    activation, inputs = torch.Size(shape).numel() * dtype.itemsize, 2 if variant == "residual" else 1
    forward, backward = (inputs + 1) * activation, (inputs + 2) * activation
    ours, eager = FUNCTIONS[variant]
    return FunctionWorkload(
        kernel=kernel,
        variant=variant,
        size=size,
        dtype=dtype,
        layout=layout,
        modes=("forward", "backward", "full"),
        quick=size in QUICK and dtype == torch.float32 and layout == "channels_last",
        inputs=partial(_inputs, variant, shape, dtype, layout),
        outputs=("output", "mean", "variance") if variant == "moments" else ("output",),
        floors={"forward": forward, "backward": backward, "full": forward + backward},
        eager=eager,
        ours=ours,
        oracle=eager,
        differentiable=("activation", "residual") if variant == "residual" else ("activation",),
    )


@lru_cache(maxsize=1)
def _inputs(variant: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device) -> dict[str, Tensor]:
    stream = torch.Generator(device).manual_seed(0)
    # No input of the ReLU is near 0, where rounding would determine the gradient.
    values, other = (torch.randint(-8, 8, shape, generator=stream, device=device) * scale for scale in (0.25, 0.5))
    images = {"activation": values + 0.125} | ({"residual": other} if variant == "residual" else {})
    bias = torch.linspace(-1, 1, shape[1], device=device).mul(4).round().div(4)
    return {"bias": bias} | {name: image.to(dtype, memory_format=LAYOUTS[layout]) for name, image in images.items()}


def _eager(bias: Tensor, x: Tensor) -> Tensor:
    return (x + bias.to(x.dtype)[:, None, None]).relu()


def _eager_residual(bias: Tensor, x: Tensor, residual: Tensor) -> Tensor:
    return (x + bias.to(x.dtype)[:, None, None] + residual).relu()


def _eager_moments(bias: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shifted = x + bias.to(x.dtype)[:, None, None]
    variance, mean = torch.var_mean(shifted, dim=(0, 2, 3), correction=0)
    return shifted.relu(), mean, variance


def _ours(bias: Tensor, x: Tensor, residual: Tensor | None = None) -> Tensor:
    return bias_act(x, bias, residual, activation="relu")


def _our_moments(bias: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y, moments = bias_act(x, bias, activation="relu", moments=True)
    mean, variance = combine_moments([moments])[:, 0]
    return y, mean, variance


FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "relu": (_ours, _eager),
    "residual": (_ours, _eager_residual),
    "moments": (_our_moments, _eager_moments),
}
