"""Stage 2: captured steps of the smallest recipes, and the correctness of every operation of every backend, called and replayed."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dfkd_fast import Trainer
from dfkd_fast.kernels import (
    Backend,
    batch_norm_act,
    bias_act,
    channel_moments,
    channel_sums,
    combine_moments,
    concat_generated,
    ema_update_,
    js_discrepancy,
    kl_discrepancy,
    l1_discrepancy,
    use_backend,
)
from dfkd_fast.kernels.dispatch import backends, has_kernel, unavailable_reason
from dfkd_fast.recipe import load_recipe

from ..end_to_end import networks
from ..micro.check import errors, mismatch
from ..micro.workload import Results
from .context import Context
from .replay import replayed

__all__ = ["run"]

Tensors = Sequence[Tensor]
BACKENDS: tuple[Backend, ...] = ("cuda", "triton")
DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPE, TOY_SHAPE = (16, 100, 28, 28), (3, 10, 7, 5)
RECIPES: Sequence[str] = ("digits", "digits-dfad", "digits-mad", "digits-bank", "digits-vae", "digits-retain-first-order", "digits-retain")
ITERATIONS, TOY_ITERATIONS = 10, 2
TOY = {"loop.batch_size": 16, "loop.student_steps": 1, "generator.width": 4, "replay.rows": 8}


class Operation(NamedTuple):
    """An operation, as a function of two inputs."""

    call: Callable[[Tensor, Tensor], Tensors]
    differentiable: int = 2
    """Number of inputs that require grad, from the first on."""
    first_dtype: torch.dtype | None = None
    """Dtype of the first input, if the operation prescribes it."""


def _ema(average: Tensor, source: Tensor) -> Tensors:
    averages = [average.clone(), average[:1].clone()]
    shadows = [torch.empty_like(tensor, dtype=torch.bfloat16) for tensor in averages]
    ema_update_(averages, [source, source[:1]], 0.9, shadows=shadows)
    return [*averages, *shadows]


def _concat(normalize: Literal["none", "batch"], a: Tensor, b: Tensor) -> Tensors:
    if normalize == "none":
        return [concat_generated([a, b], activation="tanh", normalize="none")]
    dtype = torch.promote_types(a.dtype, torch.float32)
    means, variances = ([torch.full(a.shape[1:2], value, dtype=dtype, device=a.device) for _ in range(2)] for value in (0.0, 1.0))
    batch = concat_generated(
        [a, b], activation="tanh", normalize="batch", running_means=means, running_vars=variances, training=[True, True]
    )
    return [batch, *means, *variances]


def _norm(x: Tensor, residual: Tensor | None) -> Tensors:
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, variance = (torch.full(x.shape[1:2], value, dtype=dtype, device=x.device) for value in (0.0, 1.0))
    channel = torch.arange(x.shape[1], dtype=dtype, device=x.device)
    # Keep the inputs of the ReLU away from 0, where rounding would decide the gradient.
    weight, bias = 0.3 * channel.cos(), channel.remainder(2) * 8 - 4
    arguments = x, mean, variance, weight, bias, None if residual is None else residual.clamp(-1, 1)
    y = batch_norm_act(*arguments, training=True, momentum=0.1, eps=1e-5, activation="leaky_relu", negative_slope=0.2)
    return [y, mean, variance]


def _bias(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device).cos()


def _bias_act_moments(x: Tensor, residual: Tensor) -> Tensors:
    y, moments = bias_act(x, _bias(x), residual, activation="silu", moments=True)
    return [y, *combine_moments([moments])]


def _sums(x: Tensor, _: Tensor) -> Tensors:
    return [result.float() for result in channel_sums(x)[:2]]


_SOFT: dict[str, Any] = {"temperature": 2.0, "reduction": "batchmean", "scale_by_temperature_squared": True}
OPERATIONS = {
    "ema_update_": Operation(_ema, differentiable=0, first_dtype=torch.float32),
    "l1_discrepancy": Operation(lambda a, b: [l1_discrepancy(a, b, reduction="mean")]),
    "kl_discrepancy": Operation(lambda a, b: [kl_discrepancy(a, b, **_SOFT)]),
    "js_discrepancy": Operation(lambda a, b: [js_discrepancy(a, b, **_SOFT)]),
    "concat_generated": Operation(partial(_concat, "none")),
    "concat_generated, batch norm": Operation(partial(_concat, "batch")),
    "batch_norm_act": Operation(lambda x, _: _norm(x, None), differentiable=1),
    "batch_norm_act, residual": Operation(_norm),
    "bias_act": Operation(lambda x, residual: [bias_act(x, _bias(x), residual, activation="relu6")]),
    "bias_act, moments": Operation(_bias_act_moments),
    "channel_moments": Operation(lambda a, _: channel_moments(a), differentiable=1),
    "channel_sums": Operation(_sums, differentiable=1),
}


class Case(NamedTuple):
    """One operation with one backend, dtype and memory layout."""

    operation: str
    backend: Backend
    dtype: torch.dtype
    layout: str

    def __str__(self) -> str:
        return f"{self.operation} {self.backend} {str(self.dtype).removeprefix('torch.')} {self.layout}"


def run(context: Context) -> None:
    """Run iterations of the recipes; then check values and gradients against float64, in a call and in a replay with other inputs."""
    for name in context.cases(RECIPES, needs=1.0):
        with context.attempt(name):
            iterations, changes = (TOY_ITERATIONS, TOY) if context.rehearse else (ITERATIONS, {})
            notes, seconds = _steps(name, iterations, changes, context.device)
            text = "; ".join(notes) or f"{iterations} iterations without notes"
            context.record(name, text=text, seconds=seconds, highlight=bool(notes))
    for case in context.cases([Case(*parts) for parts in product(OPERATIONS, BACKENDS, DTYPES, LAYOUTS)]):
        if case.backend not in backends(context.device):
            context.record(str(case), "skipped", unavailable_reason(case.backend) or f"does not support {context.device.type} tensors")
            continue
        if not has_kernel(case.operation, case.backend):
            context.record(str(case), "skipped", "has no kernel")
            continue
        with context.attempt(str(case)):
            wrong = _check(case, context)
            context.record(str(case), "ok" if wrong is None else "wrong", wrong or "")


def _check(case: Case, context: Context) -> str | None:
    """Return how a case differs from its reference, or None."""
    operation, random = OPERATIONS[case.operation], torch.Generator().manual_seed(0)
    shape = TOY_SHAPE if context.rehearse else SHAPE

    def draw() -> list[Tensor]:
        dtypes = operation.first_dtype or case.dtype, case.dtype
        return [torch.randn(shape, generator=random).to(dtype) for dtype in dtypes]

    inputs = [
        tensor.to(context.device, memory_format=LAYOUTS[case.layout]).requires_grad_(index < operation.differentiable)
        for index, tensor in enumerate(draw())
    ]

    def step() -> Tensors:
        with use_backend(case.backend):
            return _results(operation, inputs)

    replay, replayed_results = replayed(step, context.device)
    for how in ("called", "replayed"):
        values = draw()
        with torch.no_grad():
            for tensor, value in zip(inputs, values, strict=True):
                tensor.copy_(value)
        if how == "replayed":
            replay()
        actual = _named(step() if how == "called" else replayed_results)
        with use_backend("reference"):
            expected = _oracle(operation, values, torch.float64)
            reference_errors = errors(_oracle(operation, values), expected)
        if (wrong := mismatch({name: tensor.cpu() for name, tensor in actual.items()}, expected, reference_errors, ())) is not None:
            return f"{how}: {wrong}"
    return None


def _results(operation: Operation, inputs: Tensors) -> Tensors:
    """Return the results of a call, and the gradients of a weighted sum of them."""
    values = list(operation.call(*inputs))
    if not operation.differentiable:
        return values
    recorded = [value for value in values if value.requires_grad]
    weights = [torch.arange(1, value.numel() + 1, device=value.device).cos().reshape(value.shape).to(value) for value in recorded]
    return [*values, *torch.autograd.grad(recorded, inputs[: operation.differentiable], weights)]


def _oracle(operation: Operation, values: Tensors, dtype: torch.dtype | None = None) -> Results:
    inputs = [value.to(dtype, copy=True).requires_grad_(index < operation.differentiable) for index, value in enumerate(values)]
    return _named(_results(operation, inputs))


def _named(results: Tensors) -> Results:
    return {f"result {index}": result.detach() for index, result in enumerate(results)}


def _steps(name: str, iterations: int, changes: Mapping[str, object], device: torch.device) -> tuple[list[str], float]:
    """Run the first iterations of a recipe with overrides and untrained networks; returns the trainer's notes and the seconds of its steps.

    Raises:
        ArithmeticError: A loss is not finite.
    """
    short = {"loop.epochs": 1, "loop.iterations_per_epoch": iterations, "loop.generator_pretraining": 0}
    recipe = load_recipe(name, {**short, **changes})
    trainer = Trainer(*networks(recipe), recipe, device=device)
    trainer.fit()
    losses = trainer.history[-1].losses
    if not all(map(math.isfinite, losses.values())):
        raise ArithmeticError(f"losses are not finite: {losses}")
    seconds = trainer.state.clock.read()
    return trainer.notes, round(sum(seconds.get(phase, 0.0) for phase in ("student", "generator")), 3)
