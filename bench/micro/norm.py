"""Batch normalization in training and ReLU, channels-last; with the variant "residual", of its sum with a residual.

Minimum memory traffic: forward reads its inputs and writes the result. Backward reads the upstream gradient and the inputs and writes
a gradient for each; full is the sum of both. No implementation reaches it: a batch norm reads its input twice in each direction.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_fast.kernels import batch_norm_act

from .workload import FunctionWorkload, Provider, parse_shape

__all__ = ["EXAMPLE", "SIZES", "workloads"]

SIZES = ("16x64x32x32", "16x128x16x16", "16x256x8x8", "128x64x32x32", "256x64x56x56")
QUICK = "128x64x32x32"
EXAMPLE = "NxCxHxW, such as 16x128x16x16"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def workloads(kernel: str, size: str) -> list[FunctionWorkload]:
    """Return all cases of a size (N, C, H, W); empty if the size is invalid."""
    shape = parse_shape(size, 4)
    if shape is None:
        return []
    return [_workload(kernel, size, shape, dtype, residual) for residual in (False, True) for dtype in DTYPES]


def _workload(kernel: str, size: str, shape: tuple[int, ...], dtype: torch.dtype, residual: bool) -> FunctionWorkload:
    activation, inputs = torch.Size(shape).numel() * dtype.itemsize, 2 if residual else 1
    peers = (Provider("apex", partial(_apex, shape[1]), unavailable=_apex_unavailable_reason(), capturable=False),)
    return FunctionWorkload(
        kernel=kernel,
        variant="residual" if residual else "",
        size=size,
        dtype=dtype,
        layout="channels_last",
        modes=("forward", "backward", "full"),
        quick=size == QUICK and dtype == torch.float32,
        inputs=partial(_inputs, shape, dtype, residual),
        outputs=("output",),
        floors={
            "forward": (1 + inputs) * activation,
            "backward": (1 + 2 * inputs) * activation,
            "full": (2 + 3 * inputs) * activation,
        },
        eager=_eager,
        ours=_ours,
        oracle=_eager,
        differentiable=("activation", "gain", "offset", *(["residual"] if residual else [])),
        mutated=("mean", "variance"),
        rounded=("gradient of gain", "gradient of offset"),  # those of torch.compile are off by 2e-3 in bfloat16
        peers=peers if dtype == torch.float16 else (),  # the only dtype that it supports
    )


@lru_cache(maxsize=1)
def _inputs(shape: tuple[int, ...], dtype: torch.dtype, residual: bool, device: torch.device) -> dict[str, Tensor]:
    stream = torch.Generator(device).manual_seed(0)
    names = ("activation", "residual") if residual else ("activation",)
    images = {name: torch.randn(shape, generator=stream, device=device) for name in names}
    # No input of the ReLU is near 0, where rounding would determine the gradient.
    gain = torch.rand(shape[1], generator=stream, device=device) * 0.3
    offset = torch.linspace(0, shape[1] - 1, shape[1], device=device).remainder(2) * 4 - 2
    if residual:
        images["residual"] = images["residual"].clamp(-1, 1) * 0.3
    moments = {"mean": torch.zeros(shape[1], device=device), "variance": torch.ones(shape[1], device=device)}
    dense = {name: image.to(dtype, memory_format=torch.channels_last) for name, image in images.items()}
    return {"activation": dense.pop("activation"), "gain": gain, "offset": offset, **moments, **dense}


def _eager(x: Tensor, gain: Tensor, offset: Tensor, mean: Tensor, variance: Tensor, residual: Tensor | None = None) -> Tensor:
    normalized = F.batch_norm(x, mean, variance, gain, offset, training=True)
    return F.relu(normalized if residual is None else normalized + residual)


def _ours(x: Tensor, gain: Tensor, offset: Tensor, mean: Tensor, variance: Tensor, residual: Tensor | None = None) -> Tensor:
    return batch_norm_act(x, mean, variance, gain, offset, residual, training=True, momentum=0.1, eps=1e-5, activation="relu")


def _apex(channels: int, x: Tensor, gain: Tensor, offset: Tensor, mean: Tensor, variance: Tensor, residual: Tensor | None = None) -> Tensor:
    tensors = {"weight": gain, "bias": offset, "running_mean": mean, "running_var": variance}
    images = tuple(tensor.permute(0, 2, 3, 1) for tensor in (x, residual) if tensor is not None)
    y: Tensor = torch.func.functional_call(_apex_layer(channels), tensors, images)
    return y.permute(0, 3, 1, 2)


@lru_cache(maxsize=8)
def _apex_layer(channels: int) -> torch.nn.Module:
    layer: Callable[..., torch.nn.Module] = import_module("apex.contrib.groupbn.batch_norm").BatchNorm2d_NHWC
    return layer(channels, fuse_relu=True).cuda()


def _apex_unavailable_reason() -> str | None:
    if not torch.cuda.is_available():
        return "apex needs a GPU"
    return None if find_spec("bnp") else "NVIDIA's apex with its extension for batch norms is not installed"
