"""Batch normalisation and the leaky ReLU behind it, in one go."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..checks import differentiable_once

__all__ = ["batch_norm_leaky_relu"]

_PARAMETERS = ("running_mean", "running_var", "weight", "bias")


def batch_norm_leaky_relu(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    negative_slope: float,
) -> Tensor:
    """``leaky_relu(batch_norm(x))`` (arXiv 1502.03167, alg. 1), as generators have it behind every convolution.

    Channels-last tensors of some size on a CPU go through numba kernels: the two layers read and write activations six times
    in the forward pass, these three times; differentiable once. Everything else goes to PyTorch's own, as do the transforms of
    ``torch.func`` and forward-mode differentiation.

    Args:
        x: activations (N, C, H, W) of a floating dtype.
        running_mean, running_var: (C,), float32 or of x's dtype; moved in place in training, by the batch's mean and unbiased
            variance.
        weight, bias: gain and offset, (C,), float32 or of x's dtype, or None for 1 and 0.
        training: whether to normalise by the batch's moments or by the running ones.
        momentum: of the running statistics.
        eps: added to the variance; greater than 0 in training.
        negative_slope: of the ReLU; at least 0.

    Returns:
        A tensor like x.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a number is outside its range.
        RuntimeError: a second derivative through the kernels.
        BackendError: the backend triton or cuda is forced, which has no kernel for this.
    """
    dispatch.check_forced("batch_norm_leaky_relu")
    parameters = (running_mean, running_var, weight, bias)
    _check(x, parameters, training, momentum, eps, negative_slope)
    # In another dtype, PyTorch rounds the parameters' gradients and the running statistics as it does elsewhere.
    wide = all(tensor is None or tensor.dtype == torch.float32 for tensor in parameters)
    if not (wide and _served(x, training)):
        normalised = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        return F.leaky_relu(normalised, negative_slope, inplace=True)
    x = x.resolve_neg()  # the kernels read what is stored, which may be a number's negative
    weight = torch.ones_like(running_mean) if weight is None else weight
    bias = torch.zeros_like(running_mean) if bias is None else bias
    if not training:
        from .cpu import forward

        scale = weight * (running_var + eps).rsqrt()
        return forward(x, scale, bias - running_mean * scale, negative_slope)
    y, mean, variance = _Fused.apply(x, weight, bias, eps, negative_slope)
    count = x.numel() // x.shape[1]
    with torch.no_grad():
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(variance * (count / max(count - 1, 1)), momentum)
    return y


def _check(x: Tensor, parameters: tuple[Tensor | None, ...], training: bool, momentum: float, eps: float, negative_slope: float) -> None:
    # The kernels read where they are told.
    if x.ndim != 4:
        raise ValueError(f"x must be (N, C, H, W), not {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must be of a floating dtype, not {x.dtype}")
    shape, device, dtype = x.shape[1:2], x.device, x.dtype
    for name, tensor in zip(_PARAMETERS, parameters, strict=True):
        if tensor is None:
            if name in ("running_mean", "running_var"):
                raise ValueError(f"{name} must be a tensor {tuple(shape)}, not None")
        elif tensor.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)}, not {tuple(tensor.shape)}")
        elif tensor.device != device:
            raise ValueError(f"{name} must be on x's device {device}, not on {tensor.device}")
        elif tensor.dtype not in (torch.float32, dtype):
            raise ValueError(f"{name} must be torch.float32 or of x's dtype {dtype}, not {tensor.dtype}")
    if not isinstance(momentum, int | float):
        raise ValueError(f"momentum must be a number, not {momentum!r}")
    if eps < 0 or (training and eps == 0):
        raise ValueError(f"eps must be greater than 0 in training and at least 0 in evaluation, not {eps}")
    if negative_slope < 0:
        raise ValueError(f"negative_slope must be at least 0, not {negative_slope}")


def _served(x: Tensor, training: bool) -> bool:
    """Whether the kernels are for this call; what is compiled is better fused by the compiler."""
    return (
        not torch.compiler.is_compiling()
        and not dispatch.transforming()
        and x.device.type == "cpu"
        and type(x) is Tensor
        and x.dtype in dispatch.STORAGE
        and (x.numel() >= dispatch.WORTHWHILE["batch_norm_leaky_relu"] or dispatch.forced() == "numba")
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.numel() > x.shape[1]  # of one value a channel there are no moments, and PyTorch says so
        and (training or not torch.is_grad_enabled())
        and dispatch.forced() in (None, "numba")
        and dispatch.why_not("numba") is None
    )


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float) -> tuple[Tensor, Tensor, Tensor]:
        from ..moments.cpu import moments_forward
        from .cpu import forward

        _, _, mean, variance = moments_forward(x, "none")
        inverse = (variance + eps).rsqrt()
        scale = weight * inverse
        shift = bias - mean * scale
        ctx.save_for_backward(x, mean, inverse, scale, shift, weight)  # on the weight depends the gradient's own gradient
        ctx.slope = slope
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        return forward(x, scale, shift, slope), mean, variance

    @staticmethod
    @differentiable_once("batch_norm_leaky_relu")
    def backward(
        ctx: Any, saved: tuple[Tensor, ...], gradient: Tensor | None, *_: None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        if gradient is None:
            return None, None, None, None, None
        from .cpu import backward, backward_sums

        x, mean, inverse, scale, shift, _weight = saved
        gradient = gradient.contiguous(memory_format=torch.channels_last).resolve_neg()
        by_bias, with_x = backward_sums(gradient, x, scale, shift, ctx.slope)
        by_weight = inverse * (with_x - mean * by_bias)
        count = x.numel() // x.shape[1]
        # x̂ = (x − mean) · inverse; ∂x = scale · (g − Σg / count − x̂ · Σgx̂ / count), g the gradient before the ReLU.
        by_center = -scale * inverse * by_weight / count
        offset = -scale * by_bias / count - by_center * mean
        return backward(gradient, x, scale, shift, by_center, offset, ctx.slope), by_weight, by_bias, None, None
