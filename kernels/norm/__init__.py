"""Batch normalisation and the leaky ReLU behind it, in one go."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import dispatch

__all__ = ["batch_norm_leaky_relu"]


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
    in the forward pass, these three times; differentiable once. Everything else goes to PyTorch's own.

    Args:
        x: activations (N, C, H, W), float32, bfloat16 or float16.
        running_mean, running_var: (C,) float32; moved in place in training, by the batch's mean and unbiased variance.
        weight, bias: gain and offset, (C,) float32, or None for 1 and 0.
        training: whether to normalise by the batch's moments or by the running ones.
        momentum: of the running statistics.
        eps: added to the variance.
        negative_slope: of the ReLU; at least 0.

    Returns:
        A tensor like x.

    Raises:
        ValueError: the shapes do not fit.
        BackendError: the backend triton or cuda is forced, which has no kernel for this.
    """
    dispatch.check_forced("batch_norm_leaky_relu")
    if x.ndim != 4:
        raise ValueError(f"x must be (N, C, H, W), not {tuple(x.shape)}")
    for name, tensor in (("running_mean", running_mean), ("running_var", running_var), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != x.shape[1:2]:  # the kernels read where they are told
            raise ValueError(f"{name} must be ({x.shape[1]},), not {tuple(tensor.shape)}")
    if not _served(x, training):
        normalised = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        return F.leaky_relu(normalised, negative_slope, inplace=True)
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


def _served(x: Tensor, training: bool) -> bool:
    """Whether the kernels are for this call; what is compiled is better fused by the compiler."""
    return (
        not torch.compiler.is_compiling()
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
        ctx.save_for_backward(x, mean, inverse, scale, shift)
        ctx.slope = slope
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        return forward(x, scale, shift, slope), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        if gradient is None:
            return None, None, None, None, None
        from .cpu import backward, backward_sums

        x, mean, inverse, scale, shift = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        by_bias, with_x = backward_sums(gradient, x, scale, shift, ctx.slope)
        by_weight = inverse * (with_x - mean * by_bias)
        count = x.numel() // x.shape[1]
        # x̂ = (x − mean) · inverse; ∂x = scale · (g − Σg / count − x̂ · Σgx̂ / count), g the gradient before the ReLU.
        by_center = -scale * inverse * by_weight / count
        offset = -scale * by_bias / count - by_center * mean
        return backward(gradient, x, scale, shift, by_center, offset, ctx.slope), by_weight, by_bias, None, None
