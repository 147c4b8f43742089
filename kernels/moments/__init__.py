"""Per-channel mean and variance of activations in one pass."""

from typing import Any

import torch
from torch import Tensor

from .. import operators
from ..checks import differentiable_once
from ..dispatch import Backend, choose
from . import reference

__all__ = ["channel_moments", "channel_sums"]


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the per-channel mean and biased variance over N, H and W, as in batch normalization (arXiv 1502.03167, alg. 1).

    Used for the BN statistics loss of DeepInversion (arXiv 1912.08795, eq. 4), which compares them with the running statistics of
    the teacher.

    Args:
        x: activations (N, C, H, W) of any strides and real dtype; computed in float32.

    Returns:
        mean: per-channel mean (C,), float32 (float64 for float64 inputs); NaN if ``x`` is empty.
        variance: per-channel biased variance (C,), of the same dtype. Both are differentiable; double backward requires the
            reference backend.

    Raises:
        ValueError: ``x`` is not a dense real tensor (N, C, H, W).
        RuntimeError: double backward through a fused kernel.
        BackendError: a forced backend does not support the device or dtype.

    Examples:
        >>> import torch
        >>> from dfkd_fast.kernels import channel_moments
        >>> x = torch.arange(8.0).view(2, 1, 2, 2)
        >>> channel_moments(x)
        (tensor([3.5000]), tensor([5.2500]))
    """
    _check(x)
    backend = choose("channel_moments", x.device, (x.dtype,), x.numel())
    if backend == "reference":
        return reference.channel_moments(x)
    return _Moments.apply(x.resolve_neg(), backend)  # kernels read memory directly and ignore the negative bit


def channel_sums(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Compute the per-channel sum and sum of squares over N, H and W.

    After an all-reduce they give the moments of the global batch: ``mean = sum / count`` and
    ``variance = square_sum / count − mean²``. They are float64, in which the cancellation of this difference is harmless.

    Args:
        x: activations (N, C, H, W) of any strides and real dtype.

    Returns:
        sum: per-channel sum (C,), float64.
        square_sum: per-channel sum of squares (C,), float64. Both are differentiable; double backward requires the reference
            backend.
        count: number of elements per channel, N·H·W.

    Raises:
        ValueError: ``x`` is not a dense real tensor (N, C, H, W).
        RuntimeError: double backward through a fused kernel.
        BackendError: a forced backend does not support the device or dtype.

    Examples:
        >>> import torch
        >>> from dfkd_fast.kernels import channel_sums
        >>> channel_sums(torch.ones(2, 3, 4, 4))
        (tensor([32., 32., 32.], dtype=torch.float64), tensor([32., 32., 32.], dtype=torch.float64), 32)
    """
    _check(x)
    backend = choose("channel_moments", x.device, (x.dtype,), x.numel())
    sums = reference.channel_sums(x) if backend == "reference" else _Sums.apply(x.resolve_neg(), backend)
    return *sums, _elements(x)


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
        _, _, mean, variance = operators.operator("moments_forward", backend, x)(x, "none")
        ctx.save_for_backward(x, mean)
        ctx.backend = backend
        return mean, variance

    @staticmethod
    @differentiable_once("channel_moments")
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad_mean: Tensor, grad_variance: Tensor) -> tuple[Tensor, None]:
        x, mean = saved
        moments_backward = operators.operator("moments_backward", ctx.backend, x)
        return moments_backward(x, grad_mean.contiguous(), grad_variance.contiguous(), mean, 1 / max(_elements(x), 1)), None


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
        total, square_total, _, _ = operators.operator("moments_forward", backend, x)(x, "none")
        ctx.save_for_backward(x)
        ctx.backend = backend
        return total, square_total

    @staticmethod
    @differentiable_once("channel_sums")
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad_sum: Tensor, grad_square_sum: Tensor) -> tuple[Tensor, None]:
        (x,) = saved
        grad_sum, grad_square_sum = grad_sum.float().contiguous(), grad_square_sum.float().contiguous()
        moments_backward = operators.operator("moments_backward", ctx.backend, x)
        return moments_backward(x, grad_sum, grad_square_sum, torch.zeros_like(grad_sum), 1.0), None


def _elements(x: Tensor) -> int:
    return len(x) * x.shape[2] * x.shape[3]


def _check(x: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f"x must be (N, C, H, W), not {tuple(x.shape)}")
    if x.is_complex():
        raise ValueError(f"x must be real, not {x.dtype}")
    if x.layout != torch.strided:
        raise ValueError(f"x must have the layout torch.strided, not {x.layout}")


def _fake_forward(x: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total, square_total = (x.new_empty(x.shape[1], dtype=torch.float64) for _ in range(2))
    mean, variance = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    return total, square_total, mean, variance


def _fake_backward(x: Tensor, grad_mean: Tensor, grad_variance: Tensor, center: Tensor, scale: float) -> Tensor:
    return torch.empty_like(x)


operators.define(__name__, "moments_forward", "(Tensor x, str activation) -> (Tensor, Tensor, Tensor, Tensor)", _fake_forward)
operators.define(
    __name__,
    "moments_backward",
    "(Tensor x, Tensor grad_mean, Tensor grad_variance, Tensor center, float scale) -> Tensor",
    _fake_backward,
)
