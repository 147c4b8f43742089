"""From the pre-activations of several generators to one batch of images."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import operators
from ..dispatch import Backend, choose
from . import reference

__all__ = ["Activation", "Normalize", "concat_generated"]

Activation = Literal["tanh", "sigmoid", "none"]
Normalize = Literal["dataset", "batch", "none"]


def concat_generated(
    raws: Sequence[Tensor],
    *,
    activation: Activation,
    normalize: Normalize,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    running_means: Sequence[Tensor] | None = None,
    running_vars: Sequence[Tensor] | None = None,
    training: Sequence[bool] | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    memory_format: torch.memory_format = torch.channels_last,
) -> Tensor:
    """Activate, normalise, cast and place the outputs of several generators in one batch.

    Args:
        raws: pre-activations, one tensor (B_i, C, H, W) a generator; only B_i may differ.
        activation: what the generators end in.
        normalize: "none"; "dataset" subtracts ``mean`` and divides by ``std``; "batch" is the affine-free
            batch normalisation behind DFAD's generator A (arXiv 1912.11006), every generator by its own
            statistics.
        mean, std: (C,), for "dataset".
        running_means, running_vars, training: one (C,) float tensor and one flag a generator, for
            "batch". Where ``training`` is true the batch's statistics are used and the running ones
            updated in place as ``torch.nn.BatchNorm2d`` does; elsewhere the running ones are used.
        momentum, eps: of that batch normalisation.
        out_dtype: the batch's dtype, by default that of the first input (or of ``out``).
        out: a preallocated batch to write into; only where no gradient is recorded.
        memory_format: layout of a batch allocated here, ``torch.channels_last`` or ``torch.contiguous_format``.

    Returns:
        (ΣB_i, C, H, W), ``out`` if given, differentiable with respect to ``raws``, once; twice with the reference
        backend.

    Raises:
        ValueError: no input, inputs that differ in C, H, W or device, a missing or superfluous argument of the
            chosen normalisation, a batch of one value a channel in training, or an ``out`` that does not fit.
        BackendError: a forced backend does not serve the inputs' device or dtypes.
    """
    _check(raws, activation, normalize, mean, std, running_means, running_vars, training)
    rows = sum(len(raw) for raw in raws)
    if out is not None:
        if out.shape != (rows, *raws[0].shape[1:]):
            raise ValueError(f"out must be {(rows, *raws[0].shape[1:])}, not {tuple(out.shape)}")
        if torch.is_grad_enabled() and any(raw.requires_grad for raw in raws):
            raise ValueError("out cannot be given where a gradient is recorded: call under torch.no_grad()")
        if out_dtype not in (None, out.dtype):
            raise ValueError(f"out_dtype is {out_dtype}, but out is {out.dtype}")
        if out.device != raws[0].device:
            raise ValueError(f"out is on {out.device}, the inputs on {raws[0].device}")
    dtypes = {tensor.dtype for tensor in (raws if out is None else (*raws, out))}
    backend = choose("concat_generated", raws[0].device, dtypes, sum([raw.numel() for raw in raws]))
    if backend == "reference":
        return reference.concat_generated(
            raws, activation, normalize, mean, std, running_means, running_vars, training, momentum, eps, out_dtype, out, memory_format
        )
    batch_norm = None
    if running_means is not None and running_vars is not None and training is not None:
        batch_norm = _BatchNorm(running_means, running_vars, training, momentum, eps)
    dtype, channels_last = out_dtype or raws[0].dtype, memory_format == torch.channels_last
    return _Fused.apply(backend, activation, mean, std, batch_norm, dtype, channels_last, out, *raws)


class _BatchNorm(NamedTuple):
    running_means: Sequence[Tensor]
    running_vars: Sequence[Tensor]
    training: Sequence[bool]
    momentum: float
    eps: float


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: Backend,
        activation: Activation,
        mean: Tensor | None,
        std: Tensor | None,
        batch_norm: _BatchNorm | None,
        dtype: torch.dtype,
        channels_last: bool,
        out: Tensor | None,
        *raws: Tensor,
    ) -> Tensor:
        if mean is not None and std is not None:
            mean, std = mean.float().expand(len(raws), -1), std.float().expand(len(raws), -1)
        elif batch_norm is not None:
            mean, std = _statistics(raws, backend, activation, batch_norm)
        ctx.save_for_backward(mean, std, *raws)
        ctx.backend, ctx.activation = backend, activation
        ctx.training = batch_norm.training if batch_norm else [False] * len(raws)
        if out is None:
            return operators.operator("concat_forward", backend, raws[0])(raws, activation, mean, std, dtype, channels_last)
        operators.operator("concat_forward_out", backend, out)(out, raws, activation, mean, std)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        mean, std, *raws = ctx.saved_tensors
        parts = gradient.split([len(raw) for raw in raws])
        gradients: list[Tensor | None] = [None] * len(raws)
        for index, (part, raw, wanted) in enumerate(zip(parts, raws, ctx.needs_input_grad[8:], strict=True)):
            if wanted:
                own_mean, own_std = (None, None) if mean is None else (mean[index], std[index])
                gradients[index] = _raw_gradient(ctx, part, raw, own_mean, own_std, ctx.training[index])
        return *8 * [None], *gradients


def _raw_gradient(ctx: Any, gradient: Tensor, raw: Tensor, mean: Tensor | None, std: Tensor | None, training: bool) -> Tensor:
    moments: tuple[Tensor | None, Tensor | None] = (None, None)
    if training:  # the statistics depend on the input, too
        moments = operators.operator("concat_gradient_moments", ctx.backend, gradient)(gradient, raw, ctx.activation, mean, std)
    return operators.operator("concat_backward", ctx.backend, gradient)(gradient, raw, ctx.activation, mean, std, *moments)


def _statistics(raws: Sequence[Tensor], backend: Backend, activation: Activation, batch_norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation a generator and channel, (G, C) each; in training the running ones are moved."""
    means, variances = [], []
    for raw, running_mean, running_var, training in zip(raws, *batch_norm[:3], strict=True):
        if training:
            _, _, mean, variance = operators.operator("moments_forward", backend, raw)(raw, activation)
            count = raw.numel() // raw.shape[1]
            running_mean.lerp_(mean.to(running_mean.dtype), batch_norm.momentum)
            running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), batch_norm.momentum)
        means.append(mean if training else running_mean.float())
        variances.append(variance if training else running_var.float())
    return torch.stack(means), (torch.stack(variances) + batch_norm.eps).sqrt_()


def _check(
    raws: Sequence[Tensor],
    activation: str,
    normalize: str,
    mean: Tensor | None,
    std: Tensor | None,
    running_means: Sequence[Tensor] | None,
    running_vars: Sequence[Tensor] | None,
    training: Sequence[bool] | None,
) -> None:
    if not raws:
        raise ValueError("raws is empty: at least one generator's output is needed")
    if raws[0].ndim != 4:
        raise ValueError(f"raws[0] is {tuple(raws[0].shape)}, not (B, C, H, W)")
    for index, raw in enumerate(raws):
        if raw.shape[1:] != raws[0].shape[1:]:
            raise ValueError(f"raws[{index}] is {tuple(raw.shape)}, not (B, {', '.join(map(str, raws[0].shape[1:]))})")
        if raw.device != raws[0].device:
            raise ValueError(f"raws[{index}] is on {raw.device}, the first on {raws[0].device}")
    if activation not in ("tanh", "sigmoid", "none"):
        raise ValueError(f"activation must be 'tanh', 'sigmoid' or 'none', not {activation!r}")
    if normalize not in ("dataset", "batch", "none"):
        raise ValueError(f"normalize must be 'dataset', 'batch' or 'none', not {normalize!r}")
    channels = raws[0].shape[1]
    for name, constant in (("mean", mean), ("std", std)):
        if (constant is not None) != (normalize == "dataset"):
            raise ValueError(f"{name} goes with normalize='dataset', and normalize is {normalize!r}")
        if constant is not None and constant.shape != (channels,):
            raise ValueError(f"{name} must be ({channels},), not {tuple(constant.shape)}")
    for name, sequence in (("running_means", running_means), ("running_vars", running_vars), ("training", training)):
        if (sequence is not None) != (normalize == "batch"):
            raise ValueError(f"{name} goes with normalize='batch', and normalize is {normalize!r}")
        if sequence is not None and len(sequence) != len(raws):
            raise ValueError(f"{name} has {len(sequence)} entries for {len(raws)} generators")
    for index, (raw, batch_statistics) in enumerate(zip(raws, training or (), strict=False)):
        if batch_statistics and raw.numel() <= channels:
            raise ValueError(f"raws[{index}] is {tuple(raw.shape)}: batch statistics need more than one value a channel")


def _fake_forward(
    raws: list[Tensor], activation: str, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((sum(len(raw) for raw in raws), *raws[0].shape[1:]), dtype=dtype, device=raws[0].device, memory_format=layout)


def _fake_forward_out(out: Tensor, raws: list[Tensor], activation: str, mean: Tensor | None, std: Tensor | None) -> None:
    return None


def _fake_backward(
    gradient: Tensor,
    raw: Tensor,
    activation: str,
    mean: Tensor | None,
    std: Tensor | None,
    gradient_mean: Tensor | None,
    gradient_dot: Tensor | None,
) -> Tensor:
    return torch.empty_like(raw)


def _fake_gradient_moments(gradient: Tensor, raw: Tensor, activation: str, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    return raw.new_empty(raw.shape[1], dtype=torch.float32), raw.new_empty(raw.shape[1], dtype=torch.float32)


for _name, _schema, _fake in (
    (
        "concat_forward",
        "(Tensor[] raws, str activation, Tensor? mean, Tensor? std, ScalarType dtype, bool channels_last) -> Tensor",
        _fake_forward,
    ),
    (
        "concat_forward_out",
        "(Tensor(a!) out, Tensor[] raws, str activation, Tensor? mean, Tensor? std) -> ()",
        _fake_forward_out,
    ),
    (
        "concat_backward",
        "(Tensor gradient, Tensor raw, str activation, Tensor? mean, Tensor? std, Tensor? gradient_mean, Tensor? gradient_dot) -> Tensor",
        _fake_backward,
    ),
    (
        "concat_gradient_moments",
        "(Tensor gradient, Tensor raw, str activation, Tensor mean, Tensor std) -> (Tensor, Tensor)",
        _fake_gradient_moments,
    ),
):
    operators.define(__name__, _name, _schema, _fake)
