"""Batch normalisation and the leaky ReLU behind it, in one go."""

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch, operators
from ..checks import differentiable_once
from ..dispatch import Backend

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

    Channels-last tensors of some size on a CPU go through numba kernels, and tensors of any strides on a GPU through Triton's:
    the two layers read and write activations six times in the forward pass, these three times; differentiable once. Everything else
    goes to PyTorch's own, as do the transforms of ``torch.func`` and forward-mode differentiation.

    Args:
        x: activations (N, C, H, W) of a floating dtype.
        running_mean, running_var: (C,), float32 or of x's dtype; moved in place in training, by the batch's mean and unbiased
            variance.
        weight, bias: gain and offset, (C,), float32 or of x's dtype, or None for 1 and 0.
        training: whether to normalise by the batch's moments or by the running ones.
        momentum: of the running statistics.
        eps: added to the variance; greater than 0 in training.
        negative_slope: of the ReLU; at least 0; 1 for a batch norm alone.

    Returns:
        A tensor like x.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a number is outside its range.
        RuntimeError: a second derivative through the kernels.
        BackendError: the backend cuda is forced, which has no kernel for this, or triton, which does not serve x's device.
    """
    dispatch.check_forced("batch_norm_leaky_relu", x.device)
    parameters = (running_mean, running_var, weight, bias)
    _check(x, parameters, training, momentum, eps, negative_slope)
    # In another dtype, PyTorch rounds the parameters' gradients and the running statistics as it does elsewhere.
    wide = all(tensor is None or tensor.dtype == torch.float32 for tensor in parameters)
    backend = _backend(x, training) if wide else "reference"
    if backend == "reference":
        normalised = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        return normalised if negative_slope == 1 else F.leaky_relu(normalised, negative_slope, inplace=True)
    x = x.resolve_neg()  # the kernels read what is stored, which may be a number's negative
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


def _backend(x: Tensor, training: bool) -> Backend:
    """Whose kernels are for this call; what is compiled is better fused by the compiler."""
    usual = type(x) is Tensor and not torch.compiler.is_compiling() and not dispatch.transforming()
    moments = x.numel() > x.shape[1]  # of one value a channel there are none, and PyTorch says so
    if not (usual and moments and x.dtype in dispatch.STORAGE and (training or not torch.is_grad_enabled())):
        return "reference"
    forced, serving = dispatch.forced(), dispatch.backends(x.device)
    backend = forced or next(name for name in serving if dispatch.has_kernel("batch_norm_leaky_relu", name))
    small = forced is None and x.device.type == "cpu" and x.numel() < dispatch.MIN_NUMEL["batch_norm_leaky_relu"]
    readable = backend != "numba" or x.is_contiguous(memory_format=torch.channels_last)
    return backend if backend in serving and readable and not small else "reference"


def _kernels(backend: Backend) -> Any:
    return import_module(".cpu" if backend == "numba" else ".gpu", __name__)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float, backend: Backend
    ) -> tuple[Tensor, Tensor, Tensor]:
        kernels = _kernels(backend)
        of_moments = dispatch.forced() or dispatch.backends(x.device)[0]  # has them in CUDA, too
        _, _, mean, variance = operators.operator("moments_forward", of_moments, x)(x, "none")
        inverse, scale, shift = kernels.constants(mean, variance, weight, bias, eps)
        ctx.save_for_backward(x, mean, inverse, scale, shift, weight)  # on the weight depends the gradient's own gradient
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
