"""Batch normalization in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """``F.batch_norm`` for parameters and running statistics of any floating-point dtype and strides, and for images of any strides.

    On a CPU, PyTorch's kernels for channels-last images ignore the strides of parameters and statistics, and its gradients are wrong
    for a single image whose batch stride is not C·H·W, such as ``image.permute(2, 0, 1)[None]``.
    """
    if not x.shape[1]:
        return x.clone()
    if len(x) == 1 and x.stride(0) != x.numel() and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        x = x.clone(memory_format=torch.channels_last)
    # PyTorch supports constants of the dtype of x, and of float32 for half precision.
    same = all(constant is None or constant.dtype == x.dtype for constant in (running_mean, running_var, weight, bias))
    dtype = x.dtype if same or x.dtype == torch.float64 else torch.float32
    weight, bias = (None if constant is None else constant.to(dtype).contiguous() for constant in (weight, bias))
    if all(running.dtype == dtype and running.is_contiguous() for running in (running_mean, running_var)):
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    mean, variance = (running.to(dtype, copy=True).contiguous() for running in (running_mean, running_var))
    y = F.batch_norm(x, mean, variance, weight, bias, training, momentum, eps)
    if training:
        running_mean.copy_(mean)
        running_var.copy_(variance)
    return y
