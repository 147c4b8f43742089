"""The discrepancies on a CPU, in numba.

Logits lie in one of two ways. Where the classes of a row are neighbours and many, a task takes rows one by one and
vectorises over the classes. Elsewhere (segmentation, few classes) it takes a tile of rows and vectorises over the
rows. Both take ``log p − log q`` from shifted logits and two log-sum-exps, never from probabilities, and add up KL in
terms that a rounded log-sum-exp changes to second order only (``_kl_term``).
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

__all__ = ["js_forward", "kl_forward", "l1_forward", "scale_gradients"]

WIDE = 64  # classes from which a row alone fills the vectors
TILE = 2048  # elements a tile of rows holds: its three buffers stay in the first-level cache
# How the rows lie: the logits of row (o, i), o < outer and i < inner, begin at o · outer_stride + i · inner_stride and
# are class_stride apart. A plain tuple, which numba takes fastest: outer, inner, classes, outer_stride, inner_stride,
# class_stride.
Rows = tuple[int, int, int, int, int, int]
# Of two types, so that numba compiles the kernels for each: a branch on it costs no loop its vectors.
KL, JS = None, True
Kind = bool | None
HUGE: Any = np.float32(1e30)  # a log-ratio's finite size where a probability of 0, which multiplies it, makes it infinite
NEAR: Any = np.float32(0.25)
K2, K3, K4, K5, K6 = (np.float32(1 / math.factorial(n)) for n in range(2, 7))


def l1_forward(student: Tensor, teacher: Tensor, scale: float, gradient: bool, agreement: bool) -> tuple[Tensor, Tensor, Tensor]:
    s, t = _alike(student, teacher)
    loss, sign = s.new_empty((), dtype=torch.float32), torch.empty_like(s if gradient else s[:0], dtype=torch.int8)
    with simd.threads:
        _l1(simd.typed_pointer(s), simd.typed_pointer(t), simd.typed_pointer(sign), simd.typed_pointer(loss), s.numel(), gradient, scale)
    return loss, simd.laid_out_as(sign, student) if gradient else sign.view(-1), _agreement(s, t, agreement)


def scale_gradients(
    student_grad_unscaled: Tensor,
    teacher_grad_unscaled: Tensor,
    upstream: Tensor,
    student_scale: float,
    teacher_scale: float,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    student, teacher = (
        torch.empty_like(student_grad_unscaled, dtype=student_dtype),
        torch.empty_like(teacher_grad_unscaled, dtype=teacher_dtype),
    )
    with simd.threads:
        for unit, gradient, scale in ((student_grad_unscaled, student, student_scale), (teacher_grad_unscaled, teacher, teacher_scale)):
            if unit.numel():
                _scale(simd.typed_pointer(unit), simd.typed_pointer(gradient), simd.typed_pointer(upstream), unit.numel(), scale)
    return student, teacher


def _divergence(
    kind: Kind,
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    scale: float,
    student_gradient: bool,
    teacher_gradient: bool,
    agreement: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s, t = _alike(student, teacher)
    rows = _rows(s)
    loss = s.new_empty((), dtype=torch.float32)
    student_grad_unscaled = torch.empty_like(s if student_gradient else s[:0])
    teacher_grad_unscaled = torch.empty_like(t if teacher_gradient else t[:0])
    kernel = _row_by_row if s.stride(1) == 1 and s.shape[1] >= WIDE else _tile_by_tile
    with simd.threads:
        kernel(
            *(simd.typed_pointer(tensor) for tensor in (s, t, student_grad_unscaled, teacher_grad_unscaled, loss)),
            *(rows, student_gradient, teacher_gradient, 1 / temperature, scale, kind),
        )
    student_grad_unscaled = simd.laid_out_as(student_grad_unscaled, student) if student_gradient else student_grad_unscaled.view(-1)
    teacher_grad_unscaled = simd.laid_out_as(teacher_grad_unscaled, teacher) if teacher_gradient else teacher_grad_unscaled.view(-1)
    return loss, student_grad_unscaled, teacher_grad_unscaled, _agreement(s, t, agreement)


kl_forward, js_forward = partial(_divergence, KL), partial(_divergence, JS)


def _rows(logits: Tensor) -> Rows:
    count, classes = logits.shape[:2]
    pixels = math.prod(logits.shape[2:])
    if logits.is_contiguous() and pixels > 1:
        return count, pixels, classes, classes * pixels, 1, pixels
    return 1, count * pixels, classes, 0, classes, 1


def _alike(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dense layout: contiguous or channels-last."""
    last = student.ndim == 4 and student.is_contiguous(memory_format=torch.channels_last) and not student.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    return student.contiguous(memory_format=layout), teacher.contiguous(memory_format=layout)


def _agreement(student: Tensor, teacher: Tensor, wanted: bool) -> Tensor:
    count = torch.empty(() if wanted else 0, dtype=torch.int64)
    if wanted:
        with simd.threads:
            _count_equal_argmaxes(simd.typed_pointer(student), simd.typed_pointer(teacher), simd.typed_pointer(count), _rows(student))
    return count


@simd.parallel
def _l1(
    student: TypedPointer, teacher: TypedPointer, sign: TypedPointer, loss: TypedPointer, size: int, gradient: bool, scale: float
) -> None:
    s, t, out = simd.pointer(student), simd.pointer(teacher), simd.pointer(sign)
    partial = np.empty(-(-size // simd.BLOCK))
    for block in prange(len(partial)):
        start, end = block * simd.BLOCK, min((block + 1) * simd.BLOCK, size)
        total = ZERO
        for i in range(start, end):
            difference = simd.widen(s[i]) - simd.widen(t[i])
            total += abs(difference)
            if gradient:
                out[i] = np.int8(difference > ZERO) - np.int8(difference < ZERO)
        partial[block] = total
    simd.pointer(loss)[0] = np.float32(simd.total(partial) * scale)


@simd.parallel
def _scale(unit: TypedPointer, gradient: TypedPointer, upstream: TypedPointer, size: int, scale: float) -> None:
    given, out = simd.pointer(unit), simd.pointer(gradient)
    factor = np.float32(simd.pointer(upstream)[0] * scale)
    for block in prange(-(-size // simd.BLOCK)):
        for i in range(block * simd.BLOCK, min((block + 1) * simd.BLOCK, size)):
            out[i] = simd.narrow(simd.widen(given[i]) * factor, gradient)


@simd.parallel
def _count_equal_argmaxes(student: TypedPointer, teacher: TypedPointer, count: TypedPointer, rows: Rows) -> None:
    s, t = simd.pointer(student), simd.pointer(teacher)
    outer, inner, classes, outer_stride, inner_stride, class_stride = rows
    rows_a_block = -(-simd.BLOCK // classes)
    partial = np.empty(-(-outer * inner // rows_a_block), np.int64)
    for block in prange(len(partial)):
        equal = 0
        for row in range(block * rows_a_block, min((block + 1) * rows_a_block, outer * inner)):
            start = row // inner * outer_stride + row % inner * inner_stride
            equal += _argmax(s, start, classes, class_stride) == _argmax(t, start, classes, class_stride)
        partial[block] = equal
    simd.pointer(count)[0] = partial.sum()


@simd.helper
def _argmax(logits: Any, start: int, classes: int, class_stride: int) -> int:
    """The first maximal class; a NaN is above everything, as for torch.argmax."""
    best, largest = 0, simd.widen(logits[start])
    for c in range(1, classes):
        x = simd.widen(logits[start + c * class_stride])
        if x > largest or (x != x and largest == largest):
            best, largest = c, x
    return best


# A NaN may be overlooked here: it reaches every result through exp(x − largest). An infinity may not.
@numba.njit(fastmath={"nnan", "nsz", "reassoc"})
def _largest(one: Any, other: Any, start: int, classes: int) -> tuple[Any, Any]:
    a, b = simd.widen(one[start]), simd.widen(other[start])
    for c in range(start, start + classes):
        a, b = max(a, simd.widen(one[c])), max(b, simd.widen(other[c]))
    return a, b


@simd.inline
def _kl_term(p: Any, q: Any, d: Any) -> Any:
    """p d + (q − p) for d = log p − log q: over a row, q − p adds up to 0.

    Every term is ≥ 0, and an error of d common to a row cancels, as it does not from p d. Near 0 by the series of d + exp(−d) − 1.
    """
    near = p * (d * d) * (K2 - d * (K3 - d * (K4 - d * (K5 - d * K6))))
    return near if abs(d) < NEAR else p * d + (q - p)


@simd.inline
def _log_over_mean(d: Any) -> Any:
    """log p − log m for m = (p + q) / 2 and d = log p − log q, to some 1e-7 of its value."""
    greater = -simd.log1p(HALF * simd.expm1_of_negative(-abs(d)))  # of log p − log m and log q − log m
    return greater if d > ZERO else greater - abs(d)


@simd.inline
def _reciprocal(x: Any) -> Any:
    return ONE / x  # rounded here: in a kernel, LLVM may divide by x instead of multiplying by this


@simd.inline
def _log_ratios(p: Any, q: Any, d: Any) -> tuple[Any, Any]:
    """log p − log m and log q − log m, where m = (p + q) / 2, for d = log p − log q."""
    d = HUGE if q == ZERO else d
    d = -HUGE if p == ZERO else d
    return _log_over_mean(d), _log_over_mean(-d)


@simd.inline
def _student_grad_unscaled(weight: Any, p: Any, q: Any, b: Any, b_mean: Any, kind: Kind) -> Any:
    if kind is KL:
        return weight * (q - p)
    return weight * q * (b - b_mean)


# In both kernels p and q are the teacher's and the student's probabilities, a and b the log-ratios that they weight. KL has no b.
@simd.parallel
def _row_by_row(
    student: TypedPointer,
    teacher: TypedPointer,
    student_grad_unscaled: TypedPointer,
    teacher_grad_unscaled: TypedPointer,
    loss: TypedPointer,
    rows: Rows,
    student_gradient: bool,
    teacher_gradient: bool,
    inverse_temperature: float,
    scale: float,
    kind: Kind,
) -> None:
    s, t, s_unit, t_unit = (
        simd.pointer(student),
        simd.pointer(teacher),
        simd.pointer(student_grad_unscaled),
        simd.pointer(teacher_grad_unscaled),
    )
    _, count, classes, _, _, _ = rows
    sharpness = np.float32(inverse_temperature)
    weight = sharpness if kind is KL else HALF * sharpness
    rows_a_task = -(-simd.BLOCK // classes)
    partial = np.empty(-(-count // rows_a_task))
    for task in prange(len(partial)):
        p, q = np.empty(classes, np.float32), np.empty(classes, np.float32)
        a, b = np.empty(classes, np.float32), np.empty(classes, np.float32)
        total = 0.0
        for row in range(task * rows_a_task, min((task + 1) * rows_a_task, count)):
            start = row * classes
            p_top, q_top = _largest(t, s, start, classes)
            p_sum, q_sum = ZERO, ZERO
            for c in range(classes):
                x, y = (simd.widen(t[start + c]) - p_top) * sharpness, (simd.widen(s[start + c]) - q_top) * sharpness
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
            if teacher_gradient:
                for c in range(classes):
                    t_unit[start + c] = simd.narrow(weight * p[c] * (a[c] - a_mean), teacher_grad_unscaled)
            if student_gradient:
                for c in range(classes):
                    s_unit[start + c] = simd.narrow(_student_grad_unscaled(weight, p[c], q[c], b[c], b_mean, kind), student_grad_unscaled)
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
    student_gradient: bool,
    teacher_gradient: bool,
    inverse_temperature: float,
    scale: float,
    kind: Kind,
) -> None:
    s, t, s_unit, t_unit = (
        simd.pointer(student),
        simd.pointer(teacher),
        simd.pointer(student_grad_unscaled),
        simd.pointer(teacher_grad_unscaled),
    )
    outer, inner, classes, outer_stride, inner_stride, class_stride = rows
    sharpness = np.float32(inverse_temperature)
    weight = sharpness if kind is KL else HALF * sharpness
    rows_a_tile = max(16, TILE // classes)
    tiles = -(-inner // rows_a_tile)
    partial = np.empty(outer * tiles)
    for task in prange(len(partial)):
        first = task % tiles * rows_a_tile
        size = min(rows_a_tile, inner - first)
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
                x, y = (p[c, i] - p_top[i]) * sharpness, (q[c, i] - q_top[i]) * sharpness
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
        if teacher_gradient:
            _scatter(p, t_unit, teacher_grad_unscaled, start, class_stride, inner_stride)
        if student_gradient:
            _scatter(q, s_unit, student_grad_unscaled, start, class_stride, inner_stride)
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
def _scatter(tile: Any, out: Any, unit: TypedPointer, start: int, class_stride: int, row_stride: int) -> None:
    for c in range(tile.shape[0]):
        first = start + c * class_stride
        if row_stride == 1:
            for i in range(tile.shape[1]):
                out[first + i] = simd.narrow(tile[c, i], unit)
        else:
            for i in range(tile.shape[1]):
                out[first + i * row_stride] = simd.narrow(tile[c, i], unit)
