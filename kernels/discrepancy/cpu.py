"""Discrepancies in numba.

If the classes of a row are contiguous and many, a task processes row by row, vectorized over the classes. Otherwise
(segmentation, few classes) it processes a tile of rows, vectorized over the rows. Both compute ``log p − log q`` from shifted logits
and two log-sum-exps, not from probabilities, and sum KL in terms that depend on the rounding error of a log-sum-exp to second
order only (``_kl_term``).
"""

import math
from functools import partial
from typing import Any

import numba
import numpy as np
import torch
from numba import prange
from torch import Tensor

from .. import simd
from ..simd import HALF, ONE, ZERO, TypedPointer

__all__ = ["js_forward", "kl_forward", "l1_forward", "scale_gradients", "scale_gradients_"]

MIN_CLASSES_ROW_BY_ROW = 64  # number of classes from which one row fills the SIMD vectors
TILE = 2048  # elements per tile of rows, so that its buffers stay in the L1 cache
# (outer, inner, classes, outer_stride, inner_stride, class_stride): the logits of row (o, i), o < outer and i < inner, start at
# o · outer_stride + i · inner_stride with stride class_stride. A plain tuple, because numba unboxes it fastest.
Rows = tuple[int, int, int, int, int, int]
# Values of different types, so that numba specializes the kernels and branches on the kind do not prevent vectorization.
KL, JS = None, True
Kind = bool | None
HUGE: Any = np.float32(1e30)  # finite substitute for an infinite log ratio whose factor is a probability of 0
SERIES_MAX: Any = np.float32(0.25)
K2, K3, K4, K5, K6 = (np.float32(1 / math.factorial(n)) for n in range(2, 7))


def l1_forward(student: Tensor, teacher: Tensor, scale: float, requires_grad: bool, agreement: bool) -> tuple[Tensor, Tensor, Tensor]:
    s, t = _to_same_layout(student, teacher)
    loss, sign = s.new_empty((), dtype=torch.float32), torch.empty_like(s if requires_grad else s[:0], dtype=torch.int8)
    with simd.threads:
        _l1(*map(simd.typed_pointer, (s, t, sign, loss)), s.numel(), requires_grad, scale)
    return loss, simd.restride_like(sign, student) if requires_grad else sign.view(-1), _agreement(s, t, agreement)


def scale_gradients(
    student_grad_unscaled: Tensor,
    teacher_grad_unscaled: Tensor,
    upstream: Tensor,
    student_scale: float,
    teacher_scale: float,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    student_grad = torch.empty_like(student_grad_unscaled, dtype=student_dtype)
    teacher_grad = torch.empty_like(teacher_grad_unscaled, dtype=teacher_dtype)
    sides = (student_grad_unscaled, student_grad, student_scale), (teacher_grad_unscaled, teacher_grad, teacher_scale)
    with simd.threads:
        for grad_unscaled, grad, scale in sides:
            if grad.numel():
                _scale(*map(simd.typed_pointer, (grad_unscaled, grad, upstream)), grad.numel(), scale)
    return student_grad, teacher_grad


def scale_gradients_(student_grad: Tensor, teacher_grad: Tensor, upstream: Tensor, student_scale: float, teacher_scale: float) -> None:
    # In place, PyTorch's kernel is the fastest.
    student_factor = upstream * student_scale
    teacher_factor = student_factor if teacher_scale == student_scale else upstream * teacher_scale
    for gradient, factor in ((student_grad, student_factor), (teacher_grad, teacher_factor)):
        if not gradient.numel():
            continue
        if gradient.dtype == torch.float32:
            gradient.mul_(factor)
        else:  # PyTorch would round the factor
            gradient.copy_(gradient.float().mul_(factor))


def _divergence(
    kind: Kind,
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    scale: float,
    student_requires_grad: bool,
    teacher_requires_grad: bool,
    agreement: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s, t = _to_same_layout(student, teacher)
    rows = _rows(s)
    loss = s.new_empty((), dtype=torch.float32)
    student_grad_unscaled = torch.empty_like(s if student_requires_grad else s[:0])
    teacher_grad_unscaled = torch.empty_like(t if teacher_requires_grad else t[:0])
    kernel = _row_by_row if s.stride(1) == 1 and s.shape[1] >= MIN_CLASSES_ROW_BY_ROW else _tile_by_tile
    with simd.threads:
        kernel(
            *map(simd.typed_pointer, (s, t, student_grad_unscaled, teacher_grad_unscaled, loss)),
            *(rows, student_requires_grad, teacher_requires_grad, 1 / temperature, scale, kind),
        )
    student_grad_unscaled = simd.restride_like(student_grad_unscaled, student) if student_requires_grad else student_grad_unscaled.view(-1)
    teacher_grad_unscaled = simd.restride_like(teacher_grad_unscaled, teacher) if teacher_requires_grad else teacher_grad_unscaled.view(-1)
    return loss, student_grad_unscaled, teacher_grad_unscaled, _agreement(s, t, agreement)


kl_forward, js_forward = partial(_divergence, KL), partial(_divergence, JS)


def _rows(logits: Tensor) -> Rows:
    count, classes = logits.shape[:2]
    pixels = math.prod(logits.shape[2:])
    if logits.is_contiguous() and pixels > 1:
        return count, pixels, classes, classes * pixels, 1, pixels
    return 1, count * pixels, classes, 0, classes, 1


def _to_same_layout(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both logits in the same dense layout, contiguous or channels-last."""
    last = student.ndim == 4 and student.is_contiguous(memory_format=torch.channels_last) and not student.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    return student.contiguous(memory_format=layout), teacher.contiguous(memory_format=layout)


def _agreement(student: Tensor, teacher: Tensor, enabled: bool) -> Tensor:
    count = torch.empty(() if enabled else 0, dtype=torch.int64)
    if enabled:
        with simd.threads:
            _count_equal_argmaxes(*map(simd.typed_pointer, (student, teacher, count)), _rows(student))
    return count


@simd.parallel
def _l1(
    student: TypedPointer, teacher: TypedPointer, sign: TypedPointer, loss: TypedPointer, size: int, requires_grad: bool, scale: float
) -> None:
    s, t, out = simd.pointer(student), simd.pointer(teacher), simd.pointer(sign)
    partial = np.empty(-(-size // simd.BLOCK))
    for block in prange(len(partial)):
        start, end = block * simd.BLOCK, min((block + 1) * simd.BLOCK, size)
        total = ZERO
        for i in range(start, end):
            difference = simd.widen(s[i]) - simd.widen(t[i])
            total += abs(difference)
            if requires_grad:
                out[i] = np.int8(difference > ZERO) - np.int8(difference < ZERO)
        partial[block] = total
    simd.pointer(loss)[0] = np.float32(simd.total(partial) * scale)


@simd.parallel
def _scale(grad_unscaled: TypedPointer, gradient: TypedPointer, upstream: TypedPointer, size: int, scale: float) -> None:
    source, out = simd.pointer(grad_unscaled), simd.pointer(gradient)
    factor = np.float32(simd.pointer(upstream)[0] * scale)
    for block in prange(-(-size // simd.BLOCK)):
        for i in range(block * simd.BLOCK, min((block + 1) * simd.BLOCK, size)):
            out[i] = simd.narrow(simd.widen(source[i]) * factor, gradient)


@simd.parallel
def _count_equal_argmaxes(student: TypedPointer, teacher: TypedPointer, count: TypedPointer, rows: Rows) -> None:
    s, t = simd.pointer(student), simd.pointer(teacher)
    outer, inner, classes, outer_stride, inner_stride, class_stride = rows
    rows_per_block = -(-simd.BLOCK // classes)
    partial = np.empty(-(-outer * inner // rows_per_block), np.int64)
    for block in prange(len(partial)):
        equal = 0
        for row in range(block * rows_per_block, min((block + 1) * rows_per_block, outer * inner)):
            start = row // inner * outer_stride + row % inner * inner_stride
            equal += _argmax(s, start, classes, class_stride) == _argmax(t, start, classes, class_stride)
        partial[block] = equal
    simd.pointer(count)[0] = partial.sum()


@simd.helper
def _argmax(logits: Any, start: int, classes: int, class_stride: int) -> int:
    """Return the first class with the largest logit; NaN is the largest, as in torch.argmax."""
    best, largest = 0, simd.widen(logits[start])
    for c in range(1, classes):
        x = simd.widen(logits[start + c * class_stride])
        if x > largest or (x != x and largest == largest):
            best, largest = c, x
    return best


# nnan: a NaN may be ignored here, because it reaches every result through exp(x − max); infinities must be handled.
@numba.njit(fastmath={"nnan", "nsz", "reassoc"})
def _row_max(one: Any, other: Any, start: int, classes: int) -> tuple[Any, Any]:
    a, b = simd.widen(one[start]), simd.widen(other[start])
    for c in range(start, start + classes):
        a, b = max(a, simd.widen(one[c])), max(b, simd.widen(other[c]))
    return a, b


@simd.inline
def _kl_term(p: Any, q: Any, d: Any) -> Any:
    """Return p d + (q − p) for d = log p − log q; q − p sums to 0 over a row.

    Each term is ≥ 0, and an error of d common to a row cancels, unlike in p d. Near 0, the series of d + exp(−d) − 1 is used.
    """
    near = p * (d * d) * (K2 - d * (K3 - d * (K4 - d * (K5 - d * K6))))
    return near if abs(d) < SERIES_MAX else p * d + (q - p)


@simd.inline
def _log_over_mean(d: Any) -> Any:
    """Return log p − log m for m = (p + q) / 2 and d = log p − log q, with relative error 1e-7."""
    greater = -simd.log1p(HALF * simd.expm1_of_negative(-abs(d)))  # the larger of log p − log m and log q − log m
    return greater if d > ZERO else greater - abs(d)


@simd.inline
def _reciprocal(x: Any) -> Any:
    return ONE / x  # rounded here; inlined into a kernel, LLVM could divide by x instead of multiplying by the reciprocal


@simd.inline
def _log_ratios(p: Any, q: Any, d: Any) -> tuple[Any, Any]:
    """Return log p − log m and log q − log m, where m = (p + q) / 2, for d = log p − log q."""
    d = HUGE if q == ZERO else d
    d = -HUGE if p == ZERO else d
    return _log_over_mean(d), _log_over_mean(-d)


@simd.inline
def _student_grad_unscaled(weight: Any, p: Any, q: Any, b: Any, b_mean: Any, kind: Kind) -> Any:
    if kind is KL:
        return weight * (q - p)
    return weight * q * (b - b_mean)


# In both kernels, p and q are the probabilities of teacher and student, a and b their log ratios; KL does not use b.
@simd.parallel
def _row_by_row(
    student: TypedPointer,
    teacher: TypedPointer,
    student_grad_unscaled: TypedPointer,
    teacher_grad_unscaled: TypedPointer,
    loss: TypedPointer,
    rows: Rows,
    student_requires_grad: bool,
    teacher_requires_grad: bool,
    inverse_temperature: float,
    scale: float,
    kind: Kind,
) -> None:
    s, t, s_grad, t_grad = (
        simd.pointer(student),
        simd.pointer(teacher),
        simd.pointer(student_grad_unscaled),
        simd.pointer(teacher_grad_unscaled),
    )
    _, count, classes, _, _, _ = rows
    inverse_t = np.float32(inverse_temperature)
    weight = inverse_t if kind is KL else HALF * inverse_t
    rows_per_task = -(-simd.BLOCK // classes)
    partial = np.empty(-(-count // rows_per_task))
    for task in prange(len(partial)):
        p, q = np.empty(classes, np.float32), np.empty(classes, np.float32)
        a, b = np.empty(classes, np.float32), np.empty(classes, np.float32)
        total = 0.0
        for row in range(task * rows_per_task, min((task + 1) * rows_per_task, count)):
            start = row * classes
            p_top, q_top = _row_max(t, s, start, classes)
            p_sum, q_sum = ZERO, ZERO
            for c in range(classes):
                x, y = (simd.widen(t[start + c]) - p_top) * inverse_t, (simd.widen(s[start + c]) - q_top) * inverse_t
                p[c], q[c], a[c] = simd.exp_of_negative(x), simd.exp_of_negative(y), x - y
                p_sum += p[c]
                q_sum += q[c]
            shift, p_scale, q_scale = np.log(p_sum) - np.log(q_sum), _reciprocal(p_sum), _reciprocal(q_sum)
            a_mean, b_mean, kl = ZERO, ZERO, ZERO
            for c in range(classes):
                p[c], q[c], d = p[c] * p_scale, q[c] * q_scale, a[c] - shift
                if kind is KL:
                    a[c] = -HUGE if p[c] == ZERO else d
                    kl += _kl_term(p[c], q[c], a[c])
                else:
                    a[c], b[c] = _log_ratios(p[c], q[c], d)
                    b_mean += q[c] * b[c]
                a_mean += p[c] * a[c]
            total += kl if kind is KL else HALF * (a_mean + b_mean)
            if teacher_requires_grad:
                for c in range(classes):
                    t_grad[start + c] = simd.narrow(weight * p[c] * (a[c] - a_mean), teacher_grad_unscaled)
            if student_requires_grad:
                for c in range(classes):
                    s_grad[start + c] = simd.narrow(_student_grad_unscaled(weight, p[c], q[c], b[c], b_mean, kind), student_grad_unscaled)
        partial[task] = total
    simd.pointer(loss)[0] = np.float32(simd.total(partial) * scale)


@simd.parallel
def _tile_by_tile(
    student: TypedPointer,
    teacher: TypedPointer,
    student_grad_unscaled: TypedPointer,
    teacher_grad_unscaled: TypedPointer,
    loss: TypedPointer,
    rows: Rows,
    student_requires_grad: bool,
    teacher_requires_grad: bool,
    inverse_temperature: float,
    scale: float,
    kind: Kind,
) -> None:
    s, t, s_grad, t_grad = (
        simd.pointer(student),
        simd.pointer(teacher),
        simd.pointer(student_grad_unscaled),
        simd.pointer(teacher_grad_unscaled),
    )
    outer, inner, classes, outer_stride, inner_stride, class_stride = rows
    inverse_t = np.float32(inverse_temperature)
    weight = inverse_t if kind is KL else HALF * inverse_t
    rows_per_tile = max(16, TILE // classes)
    tiles = -(-inner // rows_per_tile)
    partial = np.empty(outer * tiles)
    for task in prange(len(partial)):
        first = task % tiles * rows_per_tile
        size = min(rows_per_tile, inner - first)
        start = task // tiles * outer_stride + first * inner_stride
        p, q = np.empty((classes, size), np.float32), np.empty((classes, size), np.float32)
        a, b = np.empty((classes, size), np.float32), np.empty((classes, size), np.float32)
        _gather(t, start, class_stride, inner_stride, p)
        _gather(s, start, class_stride, inner_stride, q)
        p_top, q_top = p[0].copy(), q[0].copy()
        for c in range(1, classes):
            for i in range(size):
                p_top[i] = p[c, i] if p[c, i] > p_top[i] else p_top[i]
                q_top[i] = q[c, i] if q[c, i] > q_top[i] else q_top[i]
        p_sum, q_sum = np.zeros(size, np.float32), np.zeros(size, np.float32)
        for c in range(classes):
            for i in range(size):
                x, y = (p[c, i] - p_top[i]) * inverse_t, (q[c, i] - q_top[i]) * inverse_t
                p[c, i], q[c, i], a[c, i] = simd.exp_of_negative(x), simd.exp_of_negative(y), x - y
                p_sum[i] += p[c, i]
                q_sum[i] += q[c, i]
        shift, kl = np.empty(size, np.float32), np.zeros(size, np.float32)
        a_mean, b_mean = np.zeros(size, np.float32), np.zeros(size, np.float32)
        for i in range(size):
            shift[i], p_sum[i], q_sum[i] = np.log(p_sum[i]) - np.log(q_sum[i]), ONE / p_sum[i], ONE / q_sum[i]
        for c in range(classes):
            for i in range(size):
                p[c, i], q[c, i], d = p[c, i] * p_sum[i], q[c, i] * q_sum[i], a[c, i] - shift[i]
                if kind is KL:
                    a[c, i] = -HUGE if p[c, i] == ZERO else d
                    kl[i] += _kl_term(p[c, i], q[c, i], a[c, i])
                else:
                    a[c, i], b[c, i] = _log_ratios(p[c, i], q[c, i], d)
                    b_mean[i] += q[c, i] * b[c, i]
                a_mean[i] += p[c, i] * a[c, i]
        partial[task] = kl.sum() if kind is KL else HALF * (a_mean.sum() + b_mean.sum())
        for c in range(classes):
            for i in range(size):
                q[c, i] = _student_grad_unscaled(weight, p[c, i], q[c, i], b[c, i], b_mean[i], kind)
                p[c, i] = weight * p[c, i] * (a[c, i] - a_mean[i])
        if teacher_requires_grad:
            _scatter(p, t_grad, teacher_grad_unscaled, start, class_stride, inner_stride)
        if student_requires_grad:
            _scatter(q, s_grad, student_grad_unscaled, start, class_stride, inner_stride)
    simd.pointer(loss)[0] = np.float32(simd.total(partial) * scale)


@simd.helper
def _gather(logits: Any, start: int, class_stride: int, row_stride: int, tile: Any) -> None:
    for c in range(tile.shape[0]):
        first = start + c * class_stride
        if row_stride == 1:
            for i in range(tile.shape[1]):
                tile[c, i] = simd.widen(logits[first + i])
        else:
            for i in range(tile.shape[1]):
                tile[c, i] = simd.widen(logits[first + i * row_stride])


@simd.helper
def _scatter(tile: Any, out: Any, typed_out: TypedPointer, start: int, class_stride: int, row_stride: int) -> None:
    for c in range(tile.shape[0]):
        first = start + c * class_stride
        if row_stride == 1:
            for i in range(tile.shape[1]):
                out[first + i] = simd.narrow(tile[c, i], typed_out)
        else:
            for i in range(tile.shape[1]):
                out[first + i * row_stride] = simd.narrow(tile[c, i], typed_out)
