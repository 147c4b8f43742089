"""What several operations check of their arguments before a kernel is given addresses, and of how they are differentiated."""

import functools
from collections.abc import Callable, Sequence
from itertools import islice
from operator import add, attrgetter, le
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["differentiable_once", "disjoint", "overlaps_itself", "share_memory", "span"]

MAX_WORK = 100_000
"""Steps after which interleaved tensors count as sharing memory, some milliseconds."""
_nbytes = attrgetter("nbytes")


def differentiable_once(operation: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For the backward pass of an autograd function: an attempt to differentiate it again says what to do instead.

    The pass is called with the saved tensors after ``ctx``. Its gradients count as functions of whatever requires grad among those and
    the upstream gradients; of the upstream gradients alone if it sets ``ctx.linear``.
    (``torch.autograd.function.once_differentiable`` looks at no saved tensor, and its error is on no way to an input: a second
    derivative can silently lack a term.)

    Args:
        operation: the public function, as the error calls it.
    """
    message = f'{operation}: its kernels have no second derivative; call it under use_backend("reference"), which has'

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def once(ctx: Any, *upstream: Tensor | None) -> Any:
            saved = ctx.saved_tensors
            with torch.no_grad():
                gradients = backward(ctx, saved, *upstream)
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # the compiler refuses second derivatives itself
                return gradients
            known = upstream if getattr(ctx, "linear", False) else (*saved, *upstream)
            sources = [tensor for tensor in known if tensor is not None and tensor.requires_grad]
            if not sources:
                return gradients
            if isinstance(gradients, Tensor):
                return _Last.apply(message, gradients, *sources)
            return tuple(None if gradient is None else _Last.apply(message, gradient, *sources) for gradient in gradients)

        return once

    return decorate


class _Last(torch.autograd.Function):
    """A gradient, which refuses to be differentiated with respect to its sources."""

    @staticmethod
    def forward(ctx: Any, message: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        ctx.message = message
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        raise RuntimeError(ctx.message)


def span(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor and the one behind its last; (0, 0) if it has no memory, as on the device meta."""
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # of a tensor that a transform has wrapped
        start = 0
    return (start, start + _extent(tensor)) if start and tensor.numel() else (0, 0)


def disjoint(tensors: Sequence[Tensor]) -> bool:
    """Whether no two tensors can share memory, by the stretches of it that they span; costs 0.2 µs a tensor.

    A tensor without elements or without memory, as on the device meta, may count as sharing some.
    """
    try:
        starts = [*map(Tensor.data_ptr, tensors)]
    except RuntimeError:  # as in span
        return True
    extents = map(_nbytes if all(map(Tensor.is_contiguous, tensors)) else _extent, tensors)
    ends = sorted(map(add, starts, extents))
    starts.sort()
    # With at most one stretch open at a time, the n-th to end ends before the next one starts.
    return all(map(le, ends, islice(starts, 1, None)))


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have a byte in common; those of interleaved slices have none."""
    (first, first_end), (second, second_end) = span(one), span(other)
    if first_end <= second or second_end <= first:
        return False
    try:
        return np.shares_memory(_addresses(one, first), _addresses(other, second), MAX_WORK)  # type: ignore[arg-type]  # or any number
    except np.exceptions.TooHardError:
        return True


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of a tensor are at one address, as after ``expand``."""
    known = torch._debug_has_internal_overlap(tensor)
    if known != 2:  # 2: PyTorch's test cannot tell
        return bool(known == 1)
    places = torch.zeros(1, dtype=torch.long)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = (places[:, None] + stride * torch.arange(size)).flatten()
    return len(places.unique()) < len(places)


def _extent(tensor: Tensor) -> int:
    """Bytes from the first of a tensor to its last."""
    if tensor.is_contiguous():
        return tensor.nbytes
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return elements * tensor.element_size() if tensor.numel() else 0


def _addresses(tensor: Tensor, start: int) -> Any:
    """An array of numpy where a tensor lies, on whatever device: to compare addresses, never to be read."""
    size = tensor.element_size()
    strides = tuple(stride * size for stride in tensor.stride())
    interface = {"data": (start, True), "shape": tuple(tensor.shape), "strides": strides, "typestr": f"|V{size}", "version": 3}
    return np.asarray(SimpleNamespace(__array_interface__=interface))
