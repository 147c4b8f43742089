"""Concatenation of the outputs of several generators: tanh, normalization, cast to bfloat16, channels-last.

Variants: "dataset" normalizes by constants; "batch" is batch normalization without affine parameters, which updates running
statistics; "dataset-out" writes to a preallocated batch, as in a captured step. The dtype of a case is that of the pre-activations.
Only the first generator, the one that is trained, receives a gradient.

Minimum memory traffic: forward reads each pre-activation once and writes the batch once, also for batch normalization, although a
second read is unavoidable if the data does not fit into the cache. Backward reads the gradient and the pre-activations of the
first generator and writes its gradient; full is the sum of both.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_fast.kernels import concat_generated

from .workload import DTYPES, LAYOUTS, FunctionWorkload, Mode, parse_shape

__all__ = ["EXAMPLE", "SIZES", "workloads"]

SIZES = ("2x256x3x32x32", "2x128x3x224x224")
QUICK = ("2x256x3x32x32",)
EXAMPLE = "GENERATORSxBxCxHxW, such as 2x256x3x32x32"
OUT_DTYPE = torch.bfloat16
MOMENTUM, EPS = 0.1, 1e-5
OFFSET = 0.5  # a mean of about 0 would have a large relative error
MODES: dict[str, tuple[Mode, ...]] = {
    "dataset": ("forward", "backward", "full"),
    "batch": ("forward", "backward", "full"),
    "dataset-out": ("forward",),
}


def workloads(kernel: str, size: str) -> list[FunctionWorkload]:
    """Return all cases of a size (generators, B, C, H, W); empty if the size is invalid."""
    shape = parse_shape(size, 5)
    if shape is None:
        return []
    return [_workload(kernel, variant, size, shape, dtype, layout) for variant in MODES for dtype in DTYPES for layout in LAYOUTS]


def _workload(kernel: str, variant: str, size: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> FunctionWorkload:
    generators, *image = shape
    elements = torch.Size(image).numel()
    read, written = elements * dtype.itemsize, elements * OUT_DTYPE.itemsize
    forward, backward = generators * (read + written), written + read + read
    eager, ours = FUNCTIONS[variant]
    return FunctionWorkload(
        kernel=kernel,
        variant=variant,
        size=size,
        dtype=dtype,
        layout=layout,
        modes=MODES[variant],
        quick=size in QUICK and dtype == torch.float32 and layout == "contiguous" and variant != "dataset-out",
        inputs=partial(_inputs, variant, shape, dtype, layout),
        outputs=("batch",),
        floors={"forward": forward, "backward": backward, "full": forward + backward},
        eager=partial(eager, OUT_DTYPE),
        ours=partial(ours, OUT_DTYPE),
        oracle=partial(eager, torch.float64),
        differentiable=("pre-activation 0",) if "full" in MODES[variant] else (),
        mutated=tuple(name for name, _ in _statistics(generators)) if variant == "batch" else (),
    )


@lru_cache(maxsize=1)
def _inputs(variant: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device) -> dict[str, Tensor]:
    """Return the arguments of a variant after the dtype: constants or statistics, then pre-activations."""
    generators, batch, channels, height, width = shape
    random = torch.Generator(device).manual_seed(0)
    made = {
        f"pre-activation {index}": (torch.randn(shape[1:], generator=random, device=device) + OFFSET).to(
            dtype, memory_format=LAYOUTS[layout]
        )
        for index in range(generators)
    }
    if variant == "batch":
        return {name: torch.full((channels,), start, device=device) for name, start in _statistics(generators)} | made
    constants = {"mean": torch.full((channels,), -0.05, device=device), "std": torch.full((channels,), 0.45, device=device)}
    if variant == "dataset-out":
        rows = generators * batch
        out = torch.empty(rows, channels, height, width, dtype=OUT_DTYPE, memory_format=torch.channels_last, device=device)
        constants["out"] = out.fill_(torch.nan)
    return constants | made


def _statistics(generators: int) -> list[tuple[str, float]]:
    """Return names and initial values of the running statistics."""
    return [(f"running {what} {index}", start) for index in range(generators) for what, start in (("mean", 0.0), ("var", 1.0))]


def _normalized(raws: Sequence[Tensor], mean: Tensor, std: Tensor) -> list[Tensor]:
    return [(raw.tanh() - mean[:, None, None]) / std[:, None, None] for raw in raws]


def _dataset(out_dtype: torch.dtype, mean: Tensor, std: Tensor, *raws: Tensor) -> Tensor:
    return torch.cat(_normalized(raws, mean, std)).to(out_dtype, memory_format=torch.channels_last)


def _our_dataset(out_dtype: torch.dtype, mean: Tensor, std: Tensor, *raws: Tensor) -> Tensor:
    return concat_generated(raws, activation="tanh", normalize="dataset", mean=mean, std=std, out_dtype=out_dtype)


def _batch(out_dtype: torch.dtype, *tensors: Tensor) -> Tensor:
    means, variances, raws = _split(tensors)
    images = [
        F.batch_norm(raw.tanh(), mean, variance, training=True, momentum=MOMENTUM, eps=EPS)
        for raw, mean, variance in zip(raws, means, variances, strict=True)
    ]
    return torch.cat(images).to(out_dtype, memory_format=torch.channels_last)


def _our_batch(out_dtype: torch.dtype, *tensors: Tensor) -> Tensor:
    means, variances, raws = _split(tensors)
    return concat_generated(
        raws,
        activation="tanh",
        normalize="batch",
        running_means=means,
        running_vars=variances,
        training=[True] * len(raws),
        momentum=MOMENTUM,
        eps=EPS,
        out_dtype=out_dtype,
    )


def _dataset_out(_: torch.dtype, mean: Tensor, std: Tensor, out: Tensor, *raws: Tensor) -> Tensor:
    return out.copy_(torch.cat(_normalized(raws, mean, std)))


def _our_dataset_out(_: torch.dtype, mean: Tensor, std: Tensor, out: Tensor, *raws: Tensor) -> Tensor:
    return concat_generated(raws, activation="tanh", normalize="dataset", mean=mean, std=std, out=out)


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "dataset": (_dataset, _our_dataset),
    "batch": (_batch, _our_batch),
    "dataset-out": (_dataset_out, _our_dataset_out),
}


def _split(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """Split the arguments into running means, running variances and pre-activations."""
    generators = len(tensors) // 3
    statistics = tensors[: 2 * generators]
    return statistics[::2], statistics[1::2], tensors[2 * generators :]
