"""Fused batch normalization and leaky ReLU."""

import math
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..checks import differentiable_once, overlaps_itself, require_bools, require_eps, require_number, require_tensors
from ..dispatch import Backend
from ..moments import mean_and_variance
from . import reference

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
    """Compute ``leaky_relu(batch_norm(x))`` with fused kernels (batch normalization: arXiv 1502.03167, alg. 1).

    The forward pass reads and writes activations three times, the separate layers six times. Numba kernels support large
    channels-last tensors on a CPU, Triton kernels tensors of any strides on a GPU. Everything else runs on PyTorch's own functions:
    other tensors, ``torch.func`` transforms, forward-mode derivatives and compiled code.

    Args:
        x: activations (N, C, H, W) of a floating-point dtype.
        running_mean: running mean (C,), float32 or of the dtype of ``x``; updated in place in training mode.
        running_var: running variance (C,), likewise; updated with the unbiased variance of the batch.
        weight: scale (C,), float32 or of the dtype of ``x``; None for 1.
        bias: shift (C,), likewise; None for 0.
        training: normalize by the batch statistics (True) or by the running statistics (False).
        momentum: weight of the batch in the running statistics, in [0, 1].
        eps: value added to the variance; must be > 0 in training mode.
        negative_slope: slope of the leaky ReLU for negative inputs, ≥ 0; 1 for batch normalization alone.

    Returns:
        A tensor of the shape and dtype of ``x``, contiguous or channels-last as ``x`` is, differentiable with respect to ``x``, ``weight``
        and ``bias``; double backward requires the reference backend.

    Raises:
        ValueError: invalid shapes, dtypes or devices, or a number outside its range.
        TypeError: an argument is not a tensor, or ``training`` is not a bool.
        RuntimeError: double backward through a fused kernel.
        BackendError: the backend cuda is forced, which has no kernel for this operation, or triton for tensors on a CPU.

    Examples:
        >>> import torch
        >>> from dfkd_fast.kernels import batch_norm_leaky_relu
        >>> x, mean, var = torch.randn(4, 3, 8, 8), torch.zeros(3), torch.ones(3)
        >>> y = batch_norm_leaky_relu(x, mean, var, None, None, training=True, momentum=0.1, eps=1e-5, negative_slope=0.2)
        >>> y.shape
        torch.Size([4, 3, 8, 8])
    """
    parameters = (running_mean, running_var, weight, bias)
    _check(x, parameters, training, momentum, eps, negative_slope)
    dispatch.check_forced("batch_norm_leaky_relu", x.device)
    # Kernels support float32 parameters only.
    wide = all(tensor is None or tensor.dtype == torch.float32 for tensor in parameters)
    backend = _backend(x, training) if wide else "reference"
    if backend == "reference":
        normalised = reference.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        return normalised if negative_slope == 1 else F.leaky_relu(normalised, negative_slope, inplace=True)
    x = x.resolve_neg()  # kernels read memory directly and ignore the negative bit
    weight = torch.ones_like(running_mean) if weight is None else weight
    bias = torch.zeros_like(running_mean) if bias is None else bias
    if not training:
        kernels = _kernels(backend)
        _, scale, shift = kernels.constants(running_mean, running_var, weight, bias, eps)
        return kernels.forward(x, scale, shift, negative_slope)
    y, mean, variance = _Fused.apply(x, weight, bias, eps, negative_slope, backend)
    count = x.numel() // x.shape[1]
    with torch.no_grad():
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(variance * (count / max(count - 1, 1)), momentum)
    return y


def _check(x: Tensor, parameters: tuple[Tensor | None, ...], training: bool, momentum: float, eps: float, negative_slope: float) -> None:
    # Kernels do not check shapes, devices or dtypes.
    require_tensors(x=x, running_mean=parameters[0], running_var=parameters[1])
    require_bools(training=training)
    if x.ndim != 4:
        raise ValueError(f"x must be (N, C, H, W), not {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must have a floating-point dtype, not {x.dtype}")
    shape, device, dtype = x.shape[1:2], x.device, x.dtype
    for name, tensor in zip(_PARAMETERS, parameters, strict=True):
        if tensor is None:
            continue
        require_tensors(**{name: tensor})
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)}, not {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on the device of x, {device}, not on {tensor.device}")
        if tensor.dtype not in (torch.float32, dtype):
            raise ValueError(f"{name} must be torch.float32 or have the dtype of x, {dtype}, not {tensor.dtype}")
        if name not in ("running_mean", "running_var"):
            continue
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires grad, but the result is not differentiable with respect to it: pass {name}.detach()")
        if training and not tensor.is_contiguous() and not torch.compiler.is_compiling() and overlaps_itself(tensor):
            raise ValueError(f"{name} must not overlap itself: strides {tensor.stride()} of shape {tuple(tensor.shape)}")
    require_number("momentum", momentum, 0, 1)
    require_eps(eps, training)
    require_number("negative_slope", negative_slope, 0, math.inf)


def _backend(x: Tensor, training: bool) -> Backend:
    """Return the backend for this call; in compiled code the reference, which the compiler fuses better."""
    plain_tensor = type(x) is Tensor and not torch.compiler.is_compiling() and not dispatch.transforming()
    moments = x.numel() > x.shape[1]  # PyTorch raises an error for one value per channel
    if not (plain_tensor and moments and x.dtype in dispatch.KERNEL_DTYPES and (training or not torch.is_grad_enabled())):
        return "reference"
    forced, available = dispatch.forced(), dispatch.backends(x.device)
    backend = forced or next(name for name in available if dispatch.has_kernel("batch_norm_leaky_relu", name))
    small = forced is None and x.device.type == "cpu" and x.numel() < dispatch.MIN_NUMEL["batch_norm_leaky_relu"]
    readable = backend != "numba" or x.is_contiguous(memory_format=torch.channels_last)
    return backend if backend in available and readable and not small else "reference"


def _kernels(backend: Backend) -> Any:
    return import_module(".cpu" if backend == "numba" else ".gpu", __name__)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float, backend: Backend
    ) -> tuple[Tensor, Tensor, Tensor]:
        kernels = _kernels(backend)
        moments_backend = dispatch.forced() or dispatch.backends(x.device)[0]  # also available in CUDA
        mean, variance = mean_and_variance(x, "none", moments_backend)
        inverse, scale, shift = kernels.constants(mean, variance, weight, bias, eps)
        ctx.save_for_backward(x, mean, inverse, scale, shift, weight)  # weight: so that double backward with respect to it raises an error
        ctx.slope, ctx.backend = slope, backend
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        return kernels.forward(x, scale, shift, slope), mean, variance

    @staticmethod
    @differentiable_once("batch_norm_leaky_relu")
    def backward(ctx: Any, saved: tuple[Tensor, ...], gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return (None,) * 6
        x, mean, inverse, scale, shift, _weight = saved
        if ctx.backend == "numba":
            gradient = gradient.contiguous(memory_format=torch.channels_last)
        gradient = gradient.resolve_neg()
        kernels = _kernels(ctx.backend)
        grad_weight, grad_bias, x_coefficient, offset = kernels.backward_constants(gradient, x, mean, inverse, scale, shift, ctx.slope)
        return kernels.backward(gradient, x, scale, shift, x_coefficient, offset, ctx.slope), grad_weight, grad_bias, None, None, None
