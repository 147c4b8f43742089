"""Run every numba kernel and print a hash of each result as JSON.

A separate program, so that the caller controls the cache: ``python -m tests.kernels.every_kernel THREADS DTYPE ...``.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dfkd_fast.kernels import (
    batch_norm_act,
    bias_act,
    channel_moments,
    combine_moments,
    concat_generated,
    ema_update_,
    js_discrepancy,
    kl_discrepancy,
    l1_discrepancy,
    use_backend,
)
from dfkd_fast.kernels.concat import Activation
from dfkd_fast.kernels.conv import cpu as winograd

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Results = Iterator[tuple[str, Tensor]]


def normal(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Tensor:
    memory_format = LAYOUTS[layout] if len(shape) == 4 else torch.contiguous_format
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(memory_format=memory_format)


def discrepancies(dtype: torch.dtype) -> Results:
    soft: dict[str, Any] = {"temperature": 3.0, "reduction": "mean", "scale_by_temperature_squared": True, "agreement": True}
    losses: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
        "l1": lambda s, t: l1_discrepancy(s, t, reduction="mean", agreement=True),
        "kl": lambda s, t: kl_discrepancy(s, t, **soft),
        "js": lambda s, t: js_discrepancy(s, t, **soft),
    }
    shapes = {"few classes": (700, 10), "many classes": (70, 1000), "pixels": (3, 5, 31, 33)}
    for name, loss in losses.items():
        for kind, shape in shapes.items():
            for layout in LAYOUTS if len(shape) == 4 else ("contiguous",):
                student, teacher = (sign * normal(*shape, dtype=dtype, layout=layout) for sign in (1, -0.7))
                sides = student.requires_grad_(), teacher.detach().requires_grad_()
                value, agreement = loss(*sides)
                scaled = torch.autograd.grad(value, sides, retain_graph=True)  # uses the kernel that scales gradients
                for part, tensor in zip(("loss", "agreement", "student", "teacher"), (value, agreement, *scaled), strict=True):
                    yield f"{name} {kind} {layout} {part}", tensor


def emas(dtype: torch.dtype) -> Results:
    for shadowed in (False, True):
        averages = [normal(size) for size in (20_001, 77)]
        shadows = [tensor.to(dtype) for tensor in averages] if shadowed else None
        ema_update_(averages, [normal(size, dtype=dtype).neg() for size in (20_001, 77)], 0.9, shadows=shadows)
        for index, tensor in enumerate((*averages, *(shadows or ()))):
            yield f"ema {shadowed} {index}", tensor


def images(dtype: torch.dtype) -> Results:
    activations: tuple[Activation, ...] = ("tanh", "sigmoid", "none")
    for activation in activations:
        for layout in LAYOUTS:
            raws = [normal(count, 3, 31, 33, dtype=dtype, layout=layout).requires_grad_() for count in (5, 4)]
            batch = concat_generated(
                raws,
                activation=activation,
                normalize="batch",
                running_means=[torch.zeros(3)] * 2,
                running_vars=[torch.ones(3)] * 2,
                training=[True] * 2,
                memory_format=LAYOUTS[layout],
            )
            upstream = normal(*batch.shape, dtype=dtype, layout=layout)
            for index, tensor in enumerate((batch, *torch.autograd.grad(batch, raws, upstream))):
                yield f"concat {activation} {layout} {index}", tensor


def moments(dtype: torch.dtype) -> Results:
    for layout in LAYOUTS:
        x = normal(9, 20, 17, 19, dtype=dtype, layout=layout).requires_grad_()
        mean, variance = channel_moments(x)
        (gradient,) = torch.autograd.grad(mean.sin().sum() + variance.cos().sum(), x)
        for part, tensor in (("mean", mean), ("variance", variance), ("gradient", gradient)):
            yield f"moments {layout} {part}", tensor


def bias_acts(dtype: torch.dtype) -> Results:
    for layout in LAYOUTS:
        x, residual = (sign * normal(9, 20, 17, 19, dtype=dtype, layout=layout) for sign in (1, -0.7))
        leaves = x.requires_grad_(), residual.requires_grad_()
        y, moments = bias_act(x, normal(20), residual, activation="silu", moments=True)
        outputs = y, combine_moments([moments])
        gradients = torch.autograd.grad([output.sin().sum() for output in outputs], leaves)
        for index, tensor in enumerate((*outputs, *gradients)):
            yield f"bias_act {layout} {index}", tensor


def norms(dtype: torch.dtype) -> Results:
    for layout in LAYOUTS:
        x, residual = (normal(9, 20, 17, 19, dtype=dtype, layout=layout).requires_grad_() for _ in range(2))
        weight, bias, mean, variance = normal(20).requires_grad_(), normal(20).detach().requires_grad_(), torch.zeros(20), torch.ones(20)
        arguments = x, mean, variance, weight, bias, residual
        y = batch_norm_act(*arguments, training=True, momentum=0.1, eps=1e-5, activation="leaky_relu", negative_slope=0.2)
        gradients = torch.autograd.grad(y, (x, residual, weight, bias), normal(*y.shape, dtype=dtype, layout=layout))
        for index, tensor in enumerate((y, mean, variance, *gradients)):
            yield f"norm {layout} {index}", tensor


def tiles() -> Results:
    x, gradient = (normal(3, channels, 13, 18, layout="channels_last") for channels in (64, 65))
    grid = winograd.tile_grid(13, 18)
    inputs, outputs = winograd.to_tiles(x, (1, 1), grid), winograd.from_tiles_adjoint(gradient, grid)
    winograd.add_tiles(inputs, x, (1, 1), grid)
    winograd.from_tiles(outputs, normal(65), gradient, grid)
    for index, tensor in enumerate((inputs, outputs, x, gradient)):
        yield f"winograd {index}", tensor


def results(dtypes: list[str]) -> Results:
    yield from tiles()
    for name in dtypes:
        for kernels in (bias_acts, discrepancies, emas, images, moments, norms):
            for key, tensor in kernels(getattr(torch, name)):
                yield f"{key} {name}", tensor


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    with use_backend("numba"):
        outputs = [(key, tensor.detach().contiguous().view(-1).view(torch.uint8)) for key, tensor in results(sys.argv[2:])]
    print(json.dumps({key: hashlib.sha256(output.numpy().tobytes()).hexdigest()[:16] for key, output in outputs}))


if __name__ == "__main__":
    main()
