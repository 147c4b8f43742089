"""Activation, normalization, cast and concatenation of several generators' outputs in one pass."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .. import operators
from ..checks import (
    differentiable_once,
    overlaps_itself,
    require_bools,
    require_eps,
    require_list,
    require_number,
    require_tensor_lists,
    require_tensors,
    share_memory,
    shown,
)
from ..dispatch import Backend, choose, transforming
from ..moments import mean_and_variance
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
    """Apply activation and normalization to the outputs of several generators and concatenate them into one batch.

    Equivalent to ``torch.cat([normalize(activation(raw)) for raw in raws]).to(out_dtype, memory_format=memory_format)``, without
    intermediate tensors. Computed in float32 (float64 for float64 inputs).

    Args:
        raws: pre-activations of the generators, tensors (B_i, C, H, W) of floating-point dtypes and any strides; only B_i and
            dtype may differ.
        activation: final activation of the generators: "tanh", "sigmoid" or "none".
        normalize: "none"; "dataset" subtracts ``mean`` and divides by ``std``; "batch" is batch normalization without affine
            parameters, as in generator A of DFAD (arXiv 1912.11006), with separate statistics for each generator.
        mean: per-channel mean (C,), for "dataset".
        std: per-channel standard deviation (C,), for "dataset".
        running_means: running mean (C,) of each generator, for "batch".
        running_vars: running variance (C,) of each generator, for "batch".
        training: for "batch", whether each generator is normalized by its batch statistics, which also update the running
            statistics in place as in ``torch.nn.BatchNorm2d``, or by its running statistics.
        momentum: weight of the batch in the running statistics, in [0, 1].
        eps: value added to the variance; must be > 0 in training mode.
        out_dtype: floating-point dtype of the batch. Default: the dtype of ``out`` or of the first input.
        out: preallocated output (ΣB_i, C, H, W) of a floating-point dtype, which must not overlap an input; only without autograd.
        memory_format: layout of the batch if ``out`` is None, ``torch.channels_last`` or ``torch.contiguous_format``.

    Returns:
        The batch (ΣB_i, C, H, W), or ``out`` if it is given. Differentiable with respect to ``raws``; double backward requires the
        reference backend.

    Raises:
        ValueError: ``raws`` is empty or its tensors differ in C, H, W or device; a dtype is not floating-point; an argument of
            the chosen normalization is missing, superfluous, of the wrong shape or requires grad; batch statistics of one value
            per channel; or ``out`` is invalid.
        TypeError: an argument is not a tensor, a list or tuple of tensors, or a bool, where it must be one.
        RuntimeError: double backward through a fused kernel.
        BackendError: a forced backend does not support the device or dtypes.

    Examples:
        >>> import torch
        >>> from dfkd_fast.kernels import concat_generated
        >>> first, second = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)
        >>> batch = concat_generated([first, second], activation="tanh", normalize="none")
        >>> batch.shape
        torch.Size([8, 3, 32, 32])
        >>> batch.is_contiguous(memory_format=torch.channels_last)
        True
    """
    _check(raws, activation, normalize, mean, std, running_means, running_vars, training, momentum, eps)
    if not isinstance(memory_format, torch.memory_format) or memory_format not in (torch.channels_last, torch.contiguous_format):
        raise ValueError(f"memory_format must be torch.channels_last or torch.contiguous_format, not {shown(memory_format)}")
    if out_dtype is not None and not (isinstance(out_dtype, torch.dtype) and out_dtype.is_floating_point):
        raise ValueError(f"out_dtype must be a floating-point dtype, not {shown(out_dtype)}")
    if out is not None:
        _check_out(out, raws, out_dtype)
    dtype = raws[0].dtype if out_dtype is None else out_dtype
    dtypes = {raw.dtype for raw in raws} | {dtype if out is None else out.dtype}
    backend = choose("concat_generated", raws[0].device, dtypes, sum([raw.numel() for raw in raws]))
    if backend == "reference":
        return reference.concat_generated(
            raws, activation, normalize, mean, std, running_means, running_vars, training, momentum, eps, out_dtype, out, memory_format
        )
    batch_norm = None
    if running_means is not None and running_vars is not None and training is not None:
        batch_norm = _BatchNorm(running_means, running_vars, training, momentum, eps)
    # Kernels read memory directly and ignore the negative bit.
    raws = [raw.resolve_neg() for raw in raws]
    return _Fused.apply(backend, activation, mean, std, batch_norm, dtype, memory_format == torch.channels_last, out, *raws)


class _BatchNorm(NamedTuple):
    running_means: Sequence[Tensor]
    running_vars: Sequence[Tensor]
    training: Sequence[bool]
    momentum: float
    eps: float


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        # Not as parameters: Dynamo loses ctx if there are as many arguments as parameters, as for two tensors in a parameter *raws.
        backend, activation, mean, std, batch_norm, dtype, channels_last, out, *raws = arguments
        if mean is not None and std is not None:
            mean, std = (constant.float().resolve_neg().expand(len(raws), -1) for constant in (mean, std))
        elif batch_norm is not None:
            mean, std = _statistics(raws, backend, activation, batch_norm)
        ctx.save_for_backward(mean, std, *raws)
        ctx.backend, ctx.activation = backend, activation
        ctx.training = batch_norm.training if batch_norm else [False] * len(raws)
        ctx.linear = activation == "none" and not any(ctx.training)
        if out is None:
            return operators.operator("concat_forward", backend, raws[0])(raws, activation, mean, std, dtype, channels_last)
        operators.operator("concat_forward_out", backend, out)(out, raws, activation, mean, std)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    @differentiable_once("concat_generated")
    def backward(ctx: Any, saved: tuple[Tensor, ...], gradient: Tensor) -> tuple[Tensor | None, ...]:
        mean, std, *raws = saved
        parts = gradient.resolve_neg().split([len(raw) for raw in raws])
        gradients: list[Tensor | None] = [None] * len(raws)
        for index, (part, raw, needs_grad) in enumerate(zip(parts, raws, ctx.needs_input_grad[8:], strict=True)):
            if needs_grad:
                own_mean, own_std = (None, None) if mean is None else (mean[index], std[index])
                gradients[index] = _raw_gradient(ctx, part, raw, own_mean, own_std, ctx.training[index])
        return *8 * [None], *gradients


def _raw_gradient(ctx: Any, gradient: Tensor, raw: Tensor, mean: Tensor | None, std: Tensor | None, training: bool) -> Tensor:
    moments: tuple[Tensor | None, Tensor | None] = (None, None)
    if training:  # the batch statistics depend on the input
        moments = operators.operator("concat_gradient_moments", ctx.backend, gradient)(gradient, raw, ctx.activation, mean, std)
    return operators.operator("concat_backward", ctx.backend, gradient)(gradient, raw, ctx.activation, mean, std, *moments)


def _statistics(raws: Sequence[Tensor], backend: Backend, activation: Activation, batch_norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, (G, C) each; in training mode the running statistics are updated."""
    means, variances = [], []
    for raw, running_mean, running_var, training in zip(raws, *batch_norm[:3], strict=True):
        if training:
            mean, variance = mean_and_variance(raw, activation, backend)
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
    momentum: float,
    eps: float,
) -> None:
    require_tensor_lists(raws=raws)
    if not raws:
        raise ValueError("raws is empty: at least one generator's output is needed")
    if raws[0].ndim != 4:
        raise ValueError(f"raws[0] is {tuple(raws[0].shape)}, not (B, C, H, W)")
    for index, raw in enumerate(raws):
        if raw.shape[1:] != raws[0].shape[1:]:
            raise ValueError(f"raws[{index}] is {tuple(raw.shape)}, not (B, {', '.join(map(str, raws[0].shape[1:]))})")
        if raw.device != raws[0].device:
            raise ValueError(f"raws[{index}] is on {raw.device}, the first on {raws[0].device}")
        if not raw.is_floating_point():
            raise ValueError(f"raws[{index}] must have a floating-point dtype, not {raw.dtype}")
    if not isinstance(activation, str) or activation not in ("tanh", "sigmoid", "none"):
        raise ValueError(f"activation must be 'tanh', 'sigmoid' or 'none', not {shown(activation)}")
    if not isinstance(normalize, str) or normalize not in ("dataset", "batch", "none"):
        raise ValueError(f"normalize must be 'dataset', 'batch' or 'none', not {shown(normalize)}")
    channels, shape, device = raws[0].shape[1], raws[0].shape[1:2], raws[0].device
    for name, constant in (("mean", mean), ("std", std)):
        if (constant is not None) != (normalize == "dataset"):
            raise ValueError(f"{name} must be given if and only if normalize is 'dataset', and normalize is {normalize!r}")
        if constant is not None:
            require_tensors(**{name: constant})
            _check_constant(name, None, constant, shape, device)
    for name, sequence in (("running_means", running_means), ("running_vars", running_vars), ("training", training)):
        if (sequence is not None) != (normalize == "batch"):
            raise ValueError(f"{name} must be given if and only if normalize is 'batch', and normalize is {normalize!r}")
        if sequence is None:
            continue
        require_list(name, sequence, "bools" if name == "training" else "tensors")
        if len(sequence) != len(raws):
            raise ValueError(f"{name} has {len(sequence)} entries for {len(raws)} generators")
    for name, statistics in (("running_means", running_means), ("running_vars", running_vars)):
        if statistics is None:
            continue
        require_tensor_lists(**{name: statistics})
        for index, constant in enumerate(statistics):
            _check_constant(name, index, constant, shape, device)
            if not constant.is_floating_point():  # updated in place
                raise ValueError(f"{name}[{index}] must have a floating-point dtype, not {constant.dtype}")
            if not constant.is_contiguous() and not torch.compiler.is_compiling() and overlaps_itself(constant):
                raise ValueError(f"{name}[{index}] must not overlap itself: strides {constant.stride()} of shape {tuple(constant.shape)}")
    if training is not None:
        require_bools(**{f"training[{index}]": batch_statistics for index, batch_statistics in enumerate(training)})
        require_number("momentum", momentum, 0, 1)
        require_eps(eps, any(training))
    for index, (raw, batch_statistics) in enumerate(zip(raws, training or (), strict=False)):
        if batch_statistics and raw.numel() <= channels:
            raise ValueError(f"raws[{index}] is {tuple(raw.shape)}: batch statistics need more than one value per channel")


def _check_constant(name: str, index: int | None, constant: Tensor, shape: torch.Size, device: torch.device) -> None:
    # Kernels do not check shapes, devices or dtypes.
    if constant.shape == shape and constant.device == device and not constant.is_complex() and not constant.requires_grad:
        return
    name = name if index is None else f"{name}[{index}]"
    if constant.shape != shape:
        raise ValueError(f"{name} must be {tuple(shape)}, not {tuple(constant.shape)}")
    if constant.device != device:
        raise ValueError(f"{name} is on {constant.device}, the inputs on {device}")
    if constant.is_complex():
        raise ValueError(f"{name} must be real, not {constant.dtype}")
    if torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, but the batch is differentiable with respect to raws only: pass {name}.detach()")


def _check_out(out: Tensor, raws: Sequence[Tensor], out_dtype: torch.dtype | None) -> None:
    require_tensors(out=out)
    shape = sum([len(raw) for raw in raws]), *raws[0].shape[1:]
    if out.shape != shape:
        raise ValueError(f"out must be {shape}, not {tuple(out.shape)}")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (out, *raws)):
        raise ValueError("out is not supported with autograd: call under torch.no_grad()")
    if not out.is_floating_point():
        raise ValueError(f"out must have a floating-point dtype, not {out.dtype}")
    if out_dtype not in (None, out.dtype):
        raise ValueError(f"out_dtype is {out_dtype}, but out is {out.dtype}")
    if out.device != raws[0].device:
        raise ValueError(f"out is on {out.device}, the inputs on {raws[0].device}")
    if torch.compiler.is_compiling() or transforming():  # no data pointers
        return
    if overlaps_itself(out):
        raise ValueError(f"out must not overlap itself: strides {out.stride()} of shape {tuple(out.shape)}")
    for index, raw in enumerate(raws):
        if share_memory(out, raw):
            raise ValueError(f"out shares memory with raws[{index}], which would be overwritten while it is read")


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
