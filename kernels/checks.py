"""Checks shared by the operations: types, ranges and memory overlap of arguments, and unsupported second derivatives."""

import functools
import math
from collections.abc import Callable, Sequence
from itertools import islice
from operator import add, attrgetter, le
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "differentiable_once",
    "disjoint",
    "overlaps_itself",
    "require_bools",
    "require_eps",
    "require_list",
    "require_number",
    "require_tensor_lists",
    "require_tensors",
    "share_memory",
    "shown",
    "span",
]

MAX_WORK = 100_000
"""Limit of ``numpy.shares_memory`` (some milliseconds), beyond which interleaved tensors are assumed to overlap."""
_nbytes = attrgetter("nbytes")


def require_tensors(**arguments: object) -> None:
    """Check the types of arguments.

    Raises:
        TypeError: an argument is not a tensor; the message names it.
    """
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")


def require_tensor_lists(**arguments: Any) -> None:
    """Check the types of arguments that are lists or other sequences of tensors.

    Raises:
        TypeError: an argument is not a sequence of tensors; the message names it, or its first element that is not a tensor.
    """
    for name, values in arguments.items():
        require_list(name, values, "tensors")
        for index, value in enumerate(values):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}[{index}] must be a tensor, not {type(value).__name__}")


def require_list(name: str, values: object, elements: str) -> None:
    """Check that an argument is a list, tuple or other sequence, but not a tensor.

    Raises:
        TypeError: it is not; the message says of what ``elements`` it must be a list.
    """
    if isinstance(values, Tensor) or not (hasattr(values, "__getitem__") and hasattr(values, "__len__")):
        raise TypeError(f"{name} must be a list or tuple of {elements}, not {type(values).__name__}")


def require_bools(**arguments: object) -> None:
    """Check the types of flags.

    Raises:
        TypeError: an argument is not True or False; the message names it.
    """
    for name, value in arguments.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, not {shown(value)}")


def require_number(name: str, value: object, lowest: float, highest: float) -> None:
    """Check a number and its range.

    Raises:
        ValueError: ``value`` is not a finite number from ``lowest`` to ``highest``.
    """
    if not _is_finite(value) or not lowest <= value <= highest:  # type: ignore[operator]
        allowed = f"from {lowest:g} to {highest:g}" if highest < math.inf else f"of at least {lowest:g}"
        raise ValueError(f"{name} must be a number {allowed}, not {shown(value)}")


def require_eps(eps: float, training: bool) -> None:
    """Check the value that a batch normalization adds to the variance.

    Raises:
        ValueError: ``eps`` is not a finite number, negative, or 0 in training.
    """
    if not _is_finite(eps) or not (eps > 0 or (eps == 0 and not training)):
        raise ValueError(f"eps must be greater than 0 in training and at least 0 in evaluation, not {shown(eps)}")


def _is_finite(value: object) -> bool:
    """Return whether a value is a number that a float can represent."""
    try:
        return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # such as 10**400
        return False


def shown(value: object) -> str:
    """Return a value for a message of one line: its ``repr``, or its type if that is long."""
    text = repr(value)
    return text if len(text) <= 100 and "\n" not in text else f"an object of the type {type(value).__name__}"


def differentiable_once(operation: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator for ``backward`` of an autograd function that raises an error on double backward.

    The decorated ``backward`` is called as ``backward(ctx, saved_tensors, *upstream)``. Its gradients are treated as functions of
    all saved tensors and upstream gradients that require grad, or of the upstream gradients only if ``ctx.linear`` is true.
    (``torch.autograd.function.once_differentiable`` ignores saved tensors, and its error node is not connected to the inputs: a
    second derivative can silently lack a term.)

    Args:
        operation: name of the public function, for the error message.
    """
    message = f'{operation}: its kernels have no second derivative; call it under use_backend("reference"), which has'

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def once(ctx: Any, *upstream: Tensor | None) -> Any:
            saved = ctx.saved_tensors
            with torch.no_grad():
                gradients = backward(ctx, saved, *upstream)
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # torch.compile rejects double backward itself
                return gradients
            inputs = upstream if getattr(ctx, "linear", False) else (*saved, *upstream)
            sources = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
            if not sources:
                return gradients
            if isinstance(gradients, Tensor):
                return _RaiseOnBackward.apply(message, gradients, *sources)
            return tuple(None if gradient is None else _RaiseOnBackward.apply(message, gradient, *sources) for gradient in gradients)

        return once

    return decorate


class _RaiseOnBackward(torch.autograd.Function):
    """Identity of a gradient that raises an error when it is differentiated with respect to ``sources``."""

    @staticmethod
    def forward(ctx: Any, message: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        ctx.message = message
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        raise RuntimeError(ctx.message)


def span(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of a tensor's first byte and one past its last; (0, 0) without storage, as on the meta device."""
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # a tensor wrapped by a torch.func transform
        start = 0
    return (start, start + _extent(tensor)) if start and tensor.numel() else (0, 0)


def disjoint(tensors: Sequence[Tensor]) -> bool:
    """Return whether the address ranges of all tensors are disjoint; takes 0.2 µs per tensor.

    Tensors without elements or without storage, as on the meta device, may be reported as overlapping.
    """
    try:
        starts = [*map(Tensor.data_ptr, tensors)]
    except RuntimeError:  # as in span
        return True
    extents = map(_nbytes if all(map(Tensor.is_contiguous, tensors)) else _extent, tensors)
    ends = sorted(map(add, starts, extents))
    starts.sort()
    # Disjoint if and only if the n-th range to end ends before the next one starts.
    return all(map(le, ends, islice(starts, 1, None)))


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have a byte in common; interleaved slices have none."""
    (first, first_end), (second, second_end) = span(one), span(other)
    if first_end <= second or second_end <= first:
        return False
    try:
        return np.shares_memory(_addresses(one, first), _addresses(other, second), MAX_WORK)  # type: ignore[arg-type]  # or any number
    except np.exceptions.TooHardError:
        return True


def overlaps_itself(tensor: Tensor) -> bool:
    """Return whether two elements of a tensor have the same address, as after ``expand``."""
    overlap = torch._debug_has_internal_overlap(tensor)
    if overlap != 2:  # 2: PyTorch's test is inconclusive
        return bool(overlap == 1)
    offsets = torch.zeros(1, dtype=torch.long)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = (offsets[:, None] + stride * torch.arange(size)).flatten()
    return len(offsets.unique()) < len(offsets)


def _extent(tensor: Tensor) -> int:
    """Return the number of bytes from a tensor's first element to the end of its last."""
    if tensor.is_contiguous():
        return tensor.nbytes
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return elements * tensor.element_size() if tensor.numel() else 0


def _addresses(tensor: Tensor, start: int) -> Any:
    """Return a NumPy array at a tensor's addresses, on any device, to compare addresses only; it must not be read."""
    size = tensor.element_size()
    strides = tuple(stride * size for stride in tensor.stride())
    interface = {"data": (start, True), "shape": tuple(tensor.shape), "strides": strides, "typestr": f"|V{size}", "version": 3}
    return np.asarray(SimpleNamespace(__array_interface__=interface))
