"""Batch normalization and activations in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

DIMENSIONS = (0, 2, 3)


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    input_bias: Tensor | None = None,
    group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    """``F.batch_norm(x + input_bias)`` for parameters and statistics of any floating-point dtype and strides, and images of any strides.

    In training mode only the running mean depends on ``input_bias``, whose gradient is 0.

    On a CPU, PyTorch's kernels for channels-last images ignore strides and negative bits of parameters and statistics, and its
    gradients are wrong for a single image whose batch stride is not C·H·W, such as ``image.permute(2, 0, 1)[None]``.

    With a process group, whose ranks must all call this, the statistics are those of the images of all ranks.
    """
    if not x.shape[1]:
        return x.clone()
    if len(x) == 1 and x.stride(0) != x.numel() and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        x = x.clone(memory_format=torch.channels_last)
    # PyTorch supports constants of the dtype of x, and of float32 for half precision.
    same = all(constant is None or constant.dtype == x.dtype for constant in (running_mean, running_var, weight, bias))
    dtype = x.dtype if same or x.dtype == torch.float64 else torch.float32
    weight, bias = (None if constant is None else constant.to(dtype).contiguous() for constant in (weight, bias))
    if input_bias is not None:
        shift = _shift(input_bias.to(dtype), running_var, weight, training, eps)
        bias = shift if bias is None else bias + shift
    mean, variance = running_mean, running_var
    in_place = not training or input_bias is None  # autograd saves the statistics, which then must not change again
    if group is not None:
        y = _batch_norm_of_all_ranks(x, mean, variance, weight, bias, momentum, eps, group)
    elif (
        mean is None
        or variance is None
        or (in_place and all(running.dtype == dtype and _is_plain(running) for running in (mean, variance)))
    ):
        y = F.batch_norm(x, mean, variance, weight, bias, training, momentum, eps)
    else:
        new_mean, new_variance = (running.to(dtype, copy=True).contiguous() for running in (mean, variance))
        y = F.batch_norm(x, new_mean, new_variance, weight, bias, training, momentum, eps)
        if training:
            mean.copy_(new_mean)
            variance.copy_(new_variance)
    if training and input_bias is not None and mean is not None:
        mean.add_(input_bias.detach().to(mean.dtype), alpha=momentum)
    return y


def _shift(input_bias: Tensor, running_var: Tensor | None, weight: Tensor | None, training: bool, eps: float) -> Tensor:
    """Return what an input bias adds to the result: 0 in training mode."""
    if training or running_var is None:
        return torch.where(torch.ones_like(input_bias, dtype=torch.bool), 0, input_bias)  # with the gradient 0
    scaled = input_bias * (running_var.to(input_bias.dtype) + eps).rsqrt()
    return scaled if weight is None else scaled * weight


def _is_plain(running: Tensor) -> bool:
    return running.is_contiguous() and (torch.compiler.is_compiling() or not running.is_neg())  # is_neg cannot be traced


def activate(x: Tensor, activation: str, negative_slope: float) -> Tensor:
    """Apply an activation, in place where PyTorch can."""
    match activation:
        case "none":
            return x
        case "relu":
            return F.relu(x, inplace=True)
        case "leaky_relu":
            return F.leaky_relu(x, negative_slope, inplace=True)
        case "relu6":
            return F.relu6(x, inplace=True)
        case "silu":
            return F.silu(x)
        case _:
            return F.hardswish(x)


def _batch_norm_of_all_ranks(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    group: "torch.distributed.ProcessGroup",
) -> Tensor:
    from torch.distributed.nn.functional import all_reduce  # takes a moment to import and is rarely needed

    wide = x.double()
    count = wide.new_full((1,), wide[:, 0].numel())
    sums = all_reduce(torch.cat([wide.sum(DIMENSIONS), wide.square().sum(DIMENSIONS), count]), group=group)
    count = sums[-1].detach()
    mean, square = sums[:-1].view(2, -1) / count
    variance = square - mean.square()
    with torch.no_grad():
        unbiased = variance * count / (count - 1).clamp(min=1)
        for running, value in ((running_mean, mean), (running_var, unbiased)):
            if running is not None:
                running.copy_(running + momentum * (value.to(running.dtype) - running))
    constants = [constant[:, None, None] for constant in (mean, (variance + eps).rsqrt())]
    y = (wide - constants[0]) * constants[1]
    y = y if weight is None else y * weight[:, None, None]
    return (y if bias is None else y + bias[:, None, None]).to(x.dtype)
