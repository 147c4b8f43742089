"""Mean and variance of every channel of an activation, in one read."""

from typing import Any

import torch
from torch import Tensor

from .. import operators
from ..checks import differentiable_once
from ..dispatch import Backend, choose
from . import reference

__all__ = ["channel_moments", "channel_sums"]


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel over N, H and W: what batch normalisation computes (arXiv 1502.03167, alg. 1).

    The BN objective (arXiv 1912.08795, eq. 4) compares them with a teacher's running statistics.

    Args:
        x: an activation (N, C, H, W), contiguous, channels-last or of any strides, of any floating dtype; read in float32.

    Returns:
        mean and variance, (C,) each, float32 (float64 for a float64 x), differentiable once; twice with the
        reference backend. NaN over no elements.

    Raises:
        ValueError: x is no (N, C, H, W) tensor of real numbers.
        RuntimeError: a second derivative through a kernel.
        BackendError: a forced backend does not serve x's device or dtype.
    """
    _check(x)
    backend = choose("channel_moments", x.device, (x.dtype,), x.numel())
    if backend == "reference":
        return reference.channel_moments(x)
    return _Moments.apply(x.resolve_neg(), backend)  # kernels read what is stored, which may be a number's negative


def channel_sums(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Sum and sum of squares of each channel over N, H and W, and how many elements went in.

    Of several ranks these add up, and give the moments of the whole batch: ``mean = sum / count`` and
    ``variance = square_sum / count − mean²``. They are float64, in which that difference cancels harmlessly.

    Args:
        x: as of ``channel_moments``.

    Returns:
        sum and sum of squares, (C,) float64 each, differentiable once (twice with the reference backend), and the
        count N·H·W.

    Raises:
        ValueError: x is no (N, C, H, W) tensor of real numbers.
        RuntimeError: a second derivative through a kernel.
        BackendError: a forced backend does not serve x's device or dtype.
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
        count = max(_elements(x), 1)
        # One launch for both: beside the kernel, a launch is what it costs on a GPU.
        offset, slope = torch._foreach_div([grad_mean, grad_variance], [count, count / 2])
        return operators.operator("moments_backward", ctx.backend, x)(x, offset, slope, mean), None


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
        offset, slope = grad_sum.float(), grad_square_sum.float() * 2
        return operators.operator("moments_backward", ctx.backend, x)(x, offset, slope, torch.zeros_like(offset)), None


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
    a, b = (x.new_empty(x.shape[1], dtype=torch.float64) for _ in range(2))
    c, d = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    return a, b, c, d


def _fake_backward(x: Tensor, offset: Tensor, slope: Tensor, center: Tensor) -> Tensor:
    return torch.empty_like(x)


operators.define(__name__, "moments_forward", "(Tensor x, str activation) -> (Tensor, Tensor, Tensor, Tensor)", _fake_forward)
operators.define(__name__, "moments_backward", "(Tensor x, Tensor offset, Tensor slope, Tensor center) -> Tensor", _fake_backward)
