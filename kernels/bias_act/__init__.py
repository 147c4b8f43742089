"""What follows a convolution into which a batch norm was folded: bias, residual, activation and statistics in one pass."""

from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

from .. import operators
from ..checks import differentiable_once, require_bools, require_tensors, shown
from ..dispatch import Backend, choose
from ..moments import PartialMoments, gradients_of_sums, moments_gradient, num_blocks
from . import reference

__all__ = ["Activation", "bias_act"]

Activation = Literal["none", "relu", "relu6", "silu", "hardswish"]


@overload
def bias_act(
    x: Tensor, bias: Tensor, residual: Tensor | None = None, *, activation: Activation, moments: Literal[False] = False
) -> Tensor: ...


@overload
def bias_act(
    x: Tensor, bias: Tensor, residual: Tensor | None = None, *, activation: Activation, moments: Literal[True]
) -> tuple[Tensor, PartialMoments]: ...


def bias_act(
    x: Tensor, bias: Tensor, residual: Tensor | None = None, *, activation: Activation, moments: bool = False
) -> Tensor | tuple[Tensor, PartialMoments]:
    """Compute ``activation(x + bias + residual)``, and optionally the partial moments of ``x + bias``, in one pass.

    Replaces what follows a frozen convolution whose batch normalization was folded into its weights: ``x`` is the output of the
    convolution without its bias. The moments are those that the BN statistics loss of DeepInversion (arXiv 1912.08795, eq. 4)
    compares, up to the scale and shift of the folded layer. Computed in float32 (float64 for float64 inputs) and rounded once.

    Args:
        x: activations (N, C, H, W) of a floating-point dtype and any strides; fastest if dense and channels-last.
        bias: per-channel bias (C,) of a floating-point dtype. Not differentiable.
        residual: tensor (N, C, H, W) of the shape and dtype of ``x``, or None for 0.
        activation: "none", "relu", "relu6", "silu" or "hardswish", as in ``torch.nn.functional``.
        moments: whether to return the moments as well, for :func:`combine_moments`.

    Returns:
        y: activations of the shape and dtype of ``x`` and the strides of ``torch.empty_like(x)``, differentiable with respect to ``x``
            and ``residual``; double backward requires the reference backend.
        moments: if ``moments``, the per-channel partial moments of ``x + bias`` over N, H and W, before residual and activation.

    Raises:
        ValueError: invalid shapes, dtypes, layouts or devices, an unknown activation, or ``bias`` requires grad.
        TypeError: an argument is not a tensor.
        RuntimeError: double backward through a fused kernel.
        BackendError: a forced backend does not support the device or dtype.

    Examples:
        >>> import torch
        >>> from dfkd_fast.kernels import bias_act, combine_moments
        >>> x = torch.tensor([-2.0, 0.0, 1.0, 3.0]).view(1, 1, 2, 2)
        >>> y, moments = bias_act(x, torch.ones(1), activation="relu", moments=True)
        >>> mean, variance = combine_moments([moments])
        >>> y.flatten(), mean, variance
        (tensor([0., 1., 2., 4.]), tensor([[1.5000]]), tensor([[3.2500]]))
    """
    _check(x, bias, residual, activation)
    require_bools(moments=moments)
    backend = choose("bias_act with moments" if moments else "bias_act", x.device, (x.dtype,), x.numel())
    if backend == "reference":
        result: Any = (reference.bias_act_moments if moments else reference.bias_act)(x, bias, residual, activation)
    else:
        # Kernels read memory directly and ignore the negative bit.
        x, bias = x.resolve_neg(), bias.detach().float().resolve_neg().contiguous()
        residual = None if residual is None else residual.resolve_neg()
        result = (_with_moments if moments else _fused)(x, bias, residual, activation, backend)
    return (result[0], PartialMoments(*result[1:])) if moments else result


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, residual: Tensor | None, activation: Activation, backend: Backend) -> Tensor:
        ctx.linear = activation == "none"
        ctx.save_for_backward(*((None,) * 3 if ctx.linear else (x, bias, residual)))
        ctx.activation, ctx.backend = activation, backend
        return operators.operator("bias_act_forward", backend, x)(x, bias, residual, activation)

    @staticmethod
    @differentiable_once("bias_act")
    def backward(ctx: Any, saved: tuple[Any, ...], gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, gradient, *saved)


class _WithMoments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor, residual: Tensor | None, activation: Activation, backend: Backend
    ) -> tuple[Tensor, Tensor, Tensor]:
        bias_act_moments = operators.operator("bias_act_moments_forward", backend, x)
        y, parts, center = bias_act_moments(x, bias, residual, activation, num_blocks(x, backend))
        ctx.save_for_backward(x, bias, residual, center)
        ctx.activation, ctx.backend = activation, backend
        ctx.mark_non_differentiable(center)
        ctx.set_materialize_grads(False)
        return y, parts, center

    @staticmethod
    @differentiable_once("bias_act")
    def backward(
        ctx: Any, saved: tuple[Any, ...], gradient: Tensor | None, grad_parts: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        x, bias, residual, center = saved
        if grad_parts is None:
            return (None,) * 5 if gradient is None else _gradients(ctx, gradient, x, bias, residual)
        scale = 1 / max(len(x) * x.shape[2] * x.shape[3], 1)
        sums = gradients_of_sums(grad_parts)
        if gradient is None:
            return moments_gradient(x, *sums, center - bias, scale, ctx.backend), None, None, None, None
        return _gradients(ctx, gradient, x, bias, residual, (*sums, center, scale))


ARGUMENTS = "(Tensor x, Tensor bias, Tensor? residual, str activation, str backend)"
_fused = operators.differentiable("bias_act_autograd", f"{ARGUMENTS} -> Tensor", _Fused)
_with_moments = operators.differentiable("bias_act_moments_autograd", f"{ARGUMENTS} -> (Tensor, Tensor, Tensor)", _WithMoments)


def _gradients(
    ctx: Any,
    gradient: Tensor,
    x: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    moments: tuple[Tensor, Tensor, Tensor, float] | tuple[None, None, None, float] = (None, None, None, 0.0),
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the arguments of ``forward``.

    ``moments`` are the upstream gradients of both moments, their center, and one over the number of elements per channel. Without them,
    x and residual have the same gradient, and one tensor is returned for both, as by the backward pass of an addition in PyTorch.
    """
    of_x, _, of_residual, *_ = ctx.needs_input_grad
    gradient = gradient.resolve_neg()
    linear = ctx.activation == "none"
    if not of_x:
        moments = None, None, None, 0.0
    if linear and moments[0] is None:
        return gradient if of_x else None, None, gradient if of_residual else None, None, None
    separate = of_residual and not linear and moments[0] is not None
    arguments = gradient, x, bias, residual, ctx.activation, *moments, separate
    grad_x, other = operators.operator("bias_act_backward", ctx.backend, gradient)(*arguments)
    grad_residual = other if separate else gradient if linear else grad_x
    return grad_x if of_x else None, None, grad_residual if of_residual else None, None, None


def _check(x: Tensor, bias: Tensor, residual: Tensor | None, activation: str) -> None:
    # Kernels do not check shapes, devices or dtypes.
    tensors = {"x": x, "bias": bias} | ({} if residual is None else {"residual": residual})
    require_tensors(**tensors)
    if x.ndim != 4:
        raise ValueError(f"x must be (N, C, H, W), not {tuple(x.shape)}")
    for name, tensor in (("x", x), ("bias", bias)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must have a floating-point dtype, not {tensor.dtype}")
    if bias.shape != x.shape[1:2]:
        raise ValueError(f"bias must be {tuple(x.shape[1:2])}, not {tuple(bias.shape)}")
    if bias.requires_grad and torch.is_grad_enabled():
        raise ValueError("bias requires grad, but the result is differentiable with respect to x and residual only: pass bias.detach()")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(f"residual must be {x.dtype} {tuple(x.shape)}, as x, not {residual.dtype} {tuple(residual.shape)}")
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} must have the layout torch.strided, not {tensor.layout}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, not on {tensor.device}")
    if not isinstance(activation, str) or activation not in get_args(Activation):
        raise ValueError(f"activation must be one of {', '.join(get_args(Activation))}, not {shown(activation)}")


def _fake_forward(x: Tensor, bias: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    return torch.empty_like(x)


def _fake_moments_forward(x: Tensor, bias: Tensor, residual: Tensor | None, activation: str, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((2, x.shape[1], 2 * blocks), dtype=torch.float32), torch.empty_like(bias)


def _fake_backward(
    gradient: Tensor,
    x: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    activation: str,
    grad_mean: Tensor | None,
    grad_variance: Tensor | None,
    center: Tensor | None,
    scale: float,
    separate: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x) if separate else x.new_empty(0)


operators.define(__name__, "bias_act_forward", "(Tensor x, Tensor bias, Tensor? residual, str activation) -> Tensor", _fake_forward)
operators.define(
    __name__,
    "bias_act_moments_forward",
    "(Tensor x, Tensor bias, Tensor? residual, str activation, int blocks) -> (Tensor, Tensor, Tensor)",
    _fake_moments_forward,
)
operators.define(
    __name__,
    "bias_act_backward",
    "(Tensor gradient, Tensor x, Tensor bias, Tensor? residual, str activation, "
    "Tensor? grad_mean, Tensor? grad_variance, Tensor? center, float scale, bool separate) -> (Tensor, Tensor)",
    _fake_backward,
)
