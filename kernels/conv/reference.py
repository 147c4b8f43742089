"""Direct convolution and its gradients as a sum over kernel elements: the reference for the other algorithms."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["conv2d", "conv2d_backward"]

Pair = tuple[int, int]


def conv2d(x: Tensor, weight: Tensor, stride: Pair = (1, 1), padding: Pair = (0, 0), dilation: Pair = (1, 1)) -> Tensor:
    """Return y[n, o, i, j] = Σ_{c, u, v} x[n, c, s·i + d·u − p, s·j + d·v − p] · w[o, c, u, v], (N, C_out, H_out, W_out)."""
    padded = _padded(x, padding)
    total: Tensor | float = 0.0
    for u, v, window in _kernel_taps(x, weight, stride, padding, dilation):
        total = total + torch.einsum("nchw,oc->nohw", padded[..., window[0], window[1]], weight[:, :, u, v])
    return torch.as_tensor(total)


def conv2d_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: Pair = (1, 1), padding: Pair = (0, 0), dilation: Pair = (1, 1)
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight of ``conv2d``, given the gradient of its output."""
    padded = _padded(x, padding)
    grad_padded, grad_weight = torch.zeros_like(padded), torch.zeros_like(weight)
    for u, v, window in _kernel_taps(x, weight, stride, padding, dilation):
        grad_padded[..., window[0], window[1]] += torch.einsum("nohw,oc->nchw", gradient, weight[:, :, u, v])
        grad_weight[:, :, u, v] = torch.einsum("nohw,nchw->oc", gradient, padded[..., window[0], window[1]])
    height, width = x.shape[2:]
    return grad_padded[..., padding[0] : padding[0] + height, padding[1] : padding[1] + width], grad_weight


def _padded(x: Tensor, padding: Pair) -> Tensor:
    return F.pad(x, (padding[1], padding[1], padding[0], padding[0]))


def _kernel_taps(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Iterator[tuple[int, int, tuple[slice, slice]]]:
    """Yield each kernel element (u, v) and the slices of the padded input that it multiplies."""
    height, width = (
        (size + 2 * pad - spread * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, spread in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    )
    for u in range(weight.shape[2]):
        for v in range(weight.shape[3]):
            rows = slice(dilation[0] * u, dilation[0] * u + stride[0] * (height - 1) + 1, stride[0])
            columns = slice(dilation[1] * v, dilation[1] * v + stride[1] * (width - 1) + 1, stride[1])
            yield u, v, (rows, columns)
