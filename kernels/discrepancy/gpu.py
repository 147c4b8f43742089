"""Discrepancies in Triton.

A row is the logits of one sample or pixel. A program processes a tile of rows × classes. If whole rows do not fit into a tile, it
loops over the classes, once for L1 and several times for the divergences. A single program writes the results. Several write
partial sums, and ``_finish_kernel`` adds them in order. Programs do not loop over tiles, because that would take up to twice as many
registers.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import Sizes, decode_sizes, launch, layout, layout_arguments, load, num_tiles, pointers, store, tile_rows

BLOCK = 2048  # elements per tile
MAX_REGISTER_TILE = 8192  # elements of the largest tile of whole rows that is kept in registers; see also MAX_SINGLE_TILE
# Elements that one program processes in less time than a second kernel takes, a launch and the latencies of memory and of a
# reduction, about 2 µs: in that time, a multiprocessor issues 14,000 instructions of a warp, 50 for each element of 256 × 32.
MAX_SINGLE_TILE = 8192


def l1_forward(student: Tensor, teacher: Tensor, scale: float, requires_grad: bool, agreement: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See kernels/discrepancy."""
    sign = torch.empty_like(student, dtype=torch.int8) if requires_grad else None
    loss, count = _forward("l1", student, teacher, sign, None, None, scale, agreement)
    return loss, _or_empty(sign, student, torch.int8), count


def _divergence(
    kind: str,
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    scale: float,
    student_requires_grad: bool,
    teacher_requires_grad: bool,
    agreement: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See kernels/discrepancy."""
    student_grad_unscaled = torch.empty_like(student) if student_requires_grad else None
    teacher_grad_unscaled = torch.empty_like(teacher) if teacher_requires_grad else None
    loss, count = _forward(kind, student, teacher, student_grad_unscaled, teacher_grad_unscaled, 1 / temperature, scale, agreement)
    return loss, _or_empty(student_grad_unscaled, student, student.dtype), _or_empty(teacher_grad_unscaled, teacher, teacher.dtype), count


kl_forward, js_forward = partial(_divergence, "kl"), partial(_divergence, "js")


def scale_gradients(
    student_grad_unscaled: Tensor,
    teacher_grad_unscaled: Tensor,
    upstream: Tensor,
    student_scale: float,
    teacher_scale: float,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See kernels/discrepancy."""
    student_grad = torch.empty_like(student_grad_unscaled, dtype=student_dtype)
    teacher_grad = torch.empty_like(teacher_grad_unscaled, dtype=teacher_dtype)
    _scale_sides(upstream, (student_grad_unscaled, student_grad, student_scale), (teacher_grad_unscaled, teacher_grad, teacher_scale))
    return student_grad, teacher_grad


def scale_gradients_(student_grad: Tensor, teacher_grad: Tensor, upstream: Tensor, student_scale: float, teacher_scale: float) -> None:
    """See kernels/discrepancy."""
    _scale_sides(upstream, (student_grad, student_grad, student_scale), (teacher_grad, teacher_grad, teacher_scale))


def _scale_sides(upstream: Tensor, *sides: tuple[Tensor, Tensor, float]) -> None:
    """Scale both sides, each a gradient, the tensor to write, which may be the same, and a factor, in one launch."""
    nonempty = [side for side in sides if side[0].numel()]
    if nonempty:  # a single side comes first, so that one kernel is enough
        numel = nonempty[0][0].numel()
        other = nonempty[1] if len(nonempty) > 1 else (None, None, 0.0)
        launch(upstream, _scale_kernel, (triton.cdiv(numel, BLOCK),), *nonempty[0], *other, upstream, numel, BLOCK)


def _forward(
    kind: str,
    student: Tensor,
    teacher: Tensor,
    student_grad_unscaled: Tensor | None,
    teacher_grad_unscaled: Tensor | None,
    inverse_temperature: float | None,
    scale: float,
    agreement: bool,
) -> tuple[Tensor, Tensor]:
    """Return the loss and the agreement; write the gradients that are not None."""
    tensors = student, teacher, student_grad_unscaled, teacher_grad_unscaled
    gradients = (
        student if student_grad_unscaled is None else student_grad_unscaled,
        teacher if teacher_grad_unscaled is None else teacher_grad_unscaled,
    )
    sizes, strides = layout(student, teacher, *gradients)
    block_rows, block_classes, warps = _tile(sizes, strides[0], MAX_REGISTER_TILE)
    single_tile = kind != "l1" and block_classes >= sizes[3]
    if not single_tile:
        block_rows, block_classes, warps = _tile(sizes, strides[0], BLOCK)
    if kind == "l1" and not agreement and _is_dense(student) and student.stride() == teacher.stride():  # elementwise
        sizes, strides = (1, 1, student.numel(), 1), [(0, 0, 1, 1)] * 4
        single = BLOCK < student.numel() <= MAX_SINGLE_TILE
        block_rows, block_classes, warps = (MAX_SINGLE_TILE, 1, 16) if single else (BLOCK, 1, 4)
    loss = student.new_empty((), dtype=torch.float32)
    agree = student.new_empty((), dtype=torch.int64) if agreement else None
    count = num_tiles(sizes, block_rows)
    losses = loss if count == 1 else loss.new_empty(count)
    agreements = agree if count == 1 or agree is None else agree.new_empty(count)
    arguments = *tensors, losses, agreements, *layout_arguments(sizes, tensors, strides), inverse_temperature
    constants = scale if count == 1 else 1.0, kind, single_tile, block_rows, block_classes
    launch(student, _rows_kernel, (count,), *arguments, *constants, num_warps=warps, enable_fp_fusion=kind == "l1")
    if count != 1:
        launch(student, _finish_kernel, (1,), losses, agreements, loss, agree, count, scale, 4096, num_warps=16)
    return loss, _or_empty(agree, student, torch.int64)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)


def _tile(sizes: Sizes, strides: Sizes, elements: int) -> tuple[int, int, int]:
    """Return the rows, classes and number of warps of a tile, with whole rows if they fit into ``elements``.

    They depend only on the number of classes and on which dimension is contiguous, because a kernel is compiled for each case,
    unless few rows of few classes fit into a single tile.
    """
    side_by_side = 32 if 0 < strides[2] <= strides[3] else 1  # rows for coalesced accesses of a warp
    classes = next((classes for classes in (16, 32, 128, 512) if classes >= sizes[3]), triton.next_power_of_2(sizes[3]))
    classes = min(classes, max(elements // side_by_side, 1))
    rows = max(side_by_side, 1024 // classes)
    if classes == 16 and side_by_side == 1 and sizes[0] * sizes[1] == 1 and rows < sizes[2] <= elements // classes:
        rows = triton.next_power_of_2(sizes[2])
        return rows, classes, rows * classes // 256
    # If adjacent threads process adjacent rows, a warp processes all their classes and reductions need no shared memory.
    warps = rows * classes // (1024 if side_by_side > 1 else 256)
    return rows, classes, min(max(warps, 1), 8)


def _or_empty(result: Tensor | None, logits: Tensor, dtype: torch.dtype) -> Tensor:
    return logits.new_empty(0, dtype=dtype) if result is None else result


@triton.jit(do_not_specialize=["student", "teacher", "student_grad_unscaled", "teacher_grad_unscaled"])
def _rows_kernel(
    student: tl.tensor,
    teacher: tl.tensor,
    student_grad_unscaled: tl.tensor,
    teacher_grad_unscaled: tl.tensor,
    losses: tl.tensor,
    agreements: tl.tensor,
    sizes: tl.tuple,
    student_strides: tl.tuple,
    teacher_strides: tl.tuple,
    student_grad_strides: tl.tuple,
    teacher_grad_strides: tl.tuple,
    accesses: tl.constexpr,
    inverse_temperature: tl.tensor,
    scale: tl.tensor,
    kind: tl.constexpr,
    single_tile: tl.constexpr,
    block_rows: tl.constexpr,
    block_classes: tl.constexpr,
) -> None:
    sizes = decode_sizes(sizes, accesses)
    program = tl.program_id(0)
    group, rows = tile_rows(program, sizes, block_rows)
    row_mask = rows < sizes[2]
    loss = tl.zeros((block_rows,), tl.float32)
    if single_tile:
        classes = tl.arange(0, block_classes)
        mask = row_mask[:, None] & (classes < sizes[3])[None, :]
        s = _logits(load(pointers(student, group, rows, classes, sizes, student_strides, accesses, 0), mask), classes, sizes)
        t = _logits(load(pointers(teacher, group, rows, classes, sizes, teacher_strides, accesses, 1), mask), classes, sizes)
        s_max = tl.max(s, axis=1)
        t_max = tl.max(t, axis=1)
        if agreements is not None:
            tl.store(agreements + program, _count_agreeing(_argmax(s, s_max, classes), _argmax(t, t_max, classes), row_mask))
        log_q, log_p, q, p = _softmax(s, t, s_max, t_max, inverse_temperature)
        loss, q_sum, p_sum = _sums(log_q, log_p, q, p, kind)
        student_grad, teacher_grad = _grads_unscaled(log_q, log_p, q, p, q_sum, p_sum, inverse_temperature, kind)
        if student_grad_unscaled is not None:
            store(pointers(student_grad_unscaled, group, rows, classes, sizes, student_grad_strides, accesses, 2), student_grad, mask)
        if teacher_grad_unscaled is not None:
            store(pointers(teacher_grad_unscaled, group, rows, classes, sizes, teacher_grad_strides, accesses, 3), teacher_grad, mask)
    else:
        s_max = tl.full((block_rows,), -float("inf"), tl.float32)
        t_max = s_max
        q_sum_exp = loss
        p_sum_exp = loss
        s_top = tl.zeros((block_rows,), tl.int32)
        t_top = s_top
        for start in range(0, sizes[3], block_classes):
            classes = start + tl.arange(0, block_classes)
            mask = row_mask[:, None] & (classes < sizes[3])[None, :]
            s = load(pointers(student, group, rows, classes, sizes, student_strides, accesses, 0), mask)
            t = load(pointers(teacher, group, rows, classes, sizes, teacher_strides, accesses, 1), mask)
            if kind == "l1":
                difference = s - t
                loss += tl.sum(tl.abs(difference), axis=1)
                if student_grad_unscaled is not None:
                    signs = (difference > 0).to(tl.int8) - (difference < 0).to(tl.int8)
                    tl.store(
                        pointers(student_grad_unscaled, group, rows, classes, sizes, student_grad_strides, accesses, 2),
                        signs,
                        mask=mask,
                    )
                s = tl.where(mask, s, -float("inf"))  # for the argmax; ``_logits`` would need more registers
                t = tl.where(mask, t, -float("inf"))
            else:
                s = _logits(s, classes, sizes)
                t = _logits(t, classes, sizes)
                q_sum_exp = _running_sum_exp(s_max, q_sum_exp, s, inverse_temperature)
                p_sum_exp = _running_sum_exp(t_max, p_sum_exp, t, inverse_temperature)
            if kind != "l1" or agreements is not None:
                s_max, s_top = _running_max(s_max, s_top, s, classes)
                t_max, t_top = _running_max(t_max, t_top, t, classes)
        if agreements is not None:
            tl.store(agreements + program, _count_agreeing(s_top, t_top, row_mask))

        if kind != "l1":
            log_q_sum_exp = tl.log(q_sum_exp)
            log_p_sum_exp = tl.log(p_sum_exp)
            q_sum = loss
            p_sum = loss
            for start in range(0, sizes[3], block_classes):
                classes = start + tl.arange(0, block_classes)
                mask = row_mask[:, None] & (classes < sizes[3])[None, :]
                s = _logits(load(pointers(student, group, rows, classes, sizes, student_strides, accesses, 0), mask), classes, sizes)
                t = _logits(load(pointers(teacher, group, rows, classes, sizes, teacher_strides, accesses, 1), mask), classes, sizes)
                log_q = (s - s_max[:, None]) * inverse_temperature - log_q_sum_exp[:, None]
                log_p = (t - t_max[:, None]) * inverse_temperature - log_p_sum_exp[:, None]
                part, q_part, p_part = _sums(log_q, log_p, tl.exp(log_q), tl.exp(log_p), kind)
                loss += part
                q_sum += q_part
                p_sum += p_part
        if kind != "l1" and (student_grad_unscaled is not None or teacher_grad_unscaled is not None):
            for start in range(0, sizes[3], block_classes):
                classes = start + tl.arange(0, block_classes)
                mask = row_mask[:, None] & (classes < sizes[3])[None, :]
                s = _logits(load(pointers(student, group, rows, classes, sizes, student_strides, accesses, 0), mask), classes, sizes)
                t = _logits(load(pointers(teacher, group, rows, classes, sizes, teacher_strides, accesses, 1), mask), classes, sizes)
                log_q = (s - s_max[:, None]) * inverse_temperature - log_q_sum_exp[:, None]
                log_p = (t - t_max[:, None]) * inverse_temperature - log_p_sum_exp[:, None]
                student_grad, teacher_grad = _grads_unscaled(
                    log_q, log_p, tl.exp(log_q), tl.exp(log_p), q_sum, p_sum, inverse_temperature, kind
                )
                if student_grad_unscaled is not None:
                    store(
                        pointers(student_grad_unscaled, group, rows, classes, sizes, student_grad_strides, accesses, 2),
                        student_grad,
                        mask,
                    )
                if teacher_grad_unscaled is not None:
                    store(
                        pointers(teacher_grad_unscaled, group, rows, classes, sizes, teacher_grad_strides, accesses, 3),
                        teacher_grad,
                        mask,
                    )
    tl.store(losses + program, tl.sum(loss) * scale)


@triton.jit
def _logits(values: tl.tensor, classes: tl.tensor, sizes: tl.tuple) -> tl.tensor:
    """Set values beyond the last class to −∞, where the softmax is then 0; rows beyond the last are 0 and contribute nothing."""
    return tl.where((classes < sizes[3])[None, :], values, -float("inf"))


@triton.jit
def _softmax(
    s: tl.tensor, t: tl.tensor, s_max: tl.tensor, t_max: tl.tensor, inverse_temperature: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return log q, log p, q and p of whole rows; both sides are interleaved, which needs fewer registers."""
    log_q = (s - s_max[:, None]) * inverse_temperature  # subtract the maximum first, for precision with large logits
    log_p = (t - t_max[:, None]) * inverse_temperature
    q = tl.exp(log_q)
    p = tl.exp(log_p)
    q_sum_exp = tl.sum(q, axis=1)[:, None]
    p_sum_exp = tl.sum(p, axis=1)[:, None]
    return log_q - tl.log(q_sum_exp), log_p - tl.log(p_sum_exp), q * (1 / q_sum_exp), p * (1 / p_sum_exp)


@triton.jit
def _running_sum_exp(maximum: tl.tensor, sum_exp: tl.tensor, logits: tl.tensor, inverse_temperature: tl.tensor) -> tl.tensor:
    """Online softmax: update the sum of exp(logit − maximum) with more logits."""
    new_maximum = tl.maximum(maximum, tl.max(logits, axis=1))
    new_maximum = tl.where(new_maximum == -float("inf"), 0, new_maximum)  # −∞ − −∞ is NaN, and larger logits may follow
    added = tl.sum(tl.exp((logits - new_maximum[:, None]) * inverse_temperature), axis=1)
    return sum_exp * tl.exp((maximum - new_maximum) * inverse_temperature) + added


@triton.jit
def _sums(log_q: tl.tensor, log_p: tl.tensor, q: tl.tensor, p: tl.tensor, kind: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return the loss of each row and the expected log ratios under q and p, which the gradients subtract."""
    q_ratio, p_ratio = _log_ratios(log_q, log_p, q, p, kind)
    p_sum = tl.sum(p * p_ratio, axis=1)
    q_sum = p_sum
    loss = p_sum
    if kind == "js":
        q_sum = tl.sum(q * q_ratio, axis=1)
        loss = 0.5 * (p_sum + q_sum)
    else:
        loss = tl.sum(_kl_terms(q, p, p_ratio), axis=1)
    return loss, q_sum, p_sum


@triton.jit
def _kl_terms(q: tl.tensor, p: tl.tensor, d: tl.tensor) -> tl.tensor:
    """Return p d + (q − p) for d = log p − log q; q − p sums to 0 over a row.

    Each term is ≥ 0, and an error of d common to a row cancels, unlike in p d. Near 0, the series of d + exp(−d) − 1 is used.
    """
    near = p * (d * d) * (1 / 2 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d * (1 / 720)))))
    return tl.where(tl.abs(d) < 0.25, near, p * d + (q - p))


@triton.jit
def _grads_unscaled(
    log_q: tl.tensor,
    log_p: tl.tensor,
    q: tl.tensor,
    p: tl.tensor,
    q_sum: tl.tensor,
    p_sum: tl.tensor,
    inverse_temperature: tl.tensor,
    kind: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the derivatives of the loss with respect to the student's and the teacher's logits."""
    q_ratio, p_ratio = _log_ratios(log_q, log_p, q, p, kind)
    student_grad = q - p
    teacher_grad = p * (p_ratio - p_sum[:, None])
    if kind == "js":
        student_grad = 0.5 * q * (q_ratio - q_sum[:, None])
        teacher_grad *= 0.5
    return student_grad * inverse_temperature, teacher_grad * inverse_temperature


@triton.jit
def _log_ratios(log_q: tl.tensor, log_p: tl.tensor, q: tl.tensor, p: tl.tensor, kind: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Return (log q − log m, log p − log m), m = (p + q)/2, for JS; the second is log p − log q for KL.

    Infinite ratios whose factor is a probability of 0 are replaced by finite values.
    """
    difference = log_p - log_q
    if kind == "js":
        difference = tl.where(q == 0, 1e30, difference)
    difference = tl.where(p == 0, -1e30, difference)
    q_ratio = difference
    p_ratio = difference
    if kind == "js":
        # Computed from the difference, not from log m: no cancellation, and equal logits give exactly 0.
        size = tl.abs(difference)
        square = size * size
        near = square * (1 / 8 - square * (1 / 192 - square * (1 / 2880))) - 0.5 * size
        log_mean = tl.where(size < 0.25, near, tl.log(0.5 + 0.5 * tl.exp(-size)))  # log of m / max(p, q)
        q_ratio = tl.minimum(-difference, 0) - log_mean
        p_ratio = tl.minimum(difference, 0) - log_mean
    return q_ratio, p_ratio


@triton.jit
def _argmax(logits: tl.tensor, maximum: tl.tensor, classes: tl.tensor) -> tl.tensor:
    """Return the argmax of each row: the first maximum, or the first NaN minus 2³⁰, which marks NaN as larger than everything."""
    first = tl.where(logits == maximum[:, None], classes[None, :], 2**30)
    return tl.min(tl.where(logits != logits, classes[None, :] - 2**30, first), axis=1)


@triton.jit
def _running_max(maximum: tl.tensor, top: tl.tensor, logits: tl.tensor, classes: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Update maximum and argmax with more logits."""
    new_maximum = tl.max(logits, axis=1)
    new_top = _argmax(logits, new_maximum, classes)
    wins = (top >= 0) & ((new_top < 0) | (new_maximum > maximum))
    return tl.maximum(maximum, new_maximum), tl.where(wins, new_top, top)


@triton.jit
def _count_agreeing(s_top: tl.tensor, t_top: tl.tensor, row_mask: tl.tensor) -> tl.tensor:
    same = (s_top & (2**30 - 1)) == (t_top & (2**30 - 1))
    return tl.sum((same & row_mask).to(tl.int32))


@triton.jit(do_not_specialize=["count"])
def _finish_kernel(
    losses: tl.tensor,
    agreements: tl.tensor,
    loss: tl.tensor,
    agree: tl.tensor,
    count: tl.tensor,
    scale: tl.tensor,
    block: tl.constexpr,
) -> None:
    total = tl.zeros((block,), tl.float32)
    agreeing = tl.zeros((block,), tl.int64)
    for start in range(0, count, block):
        partials = start + tl.arange(0, block)
        total += tl.load(losses + partials, mask=partials < count, other=0)
        if agreements is not None:
            agreeing += tl.load(agreements + partials, mask=partials < count, other=0)
    tl.store(loss, tl.sum(total) * scale)
    if agreements is not None:
        tl.store(agree, tl.sum(agreeing))


@triton.jit(do_not_specialize=["numel"])
def _scale_kernel(
    grad_unscaled: tl.tensor,
    gradient: tl.tensor,
    scale: tl.tensor,
    other_grad_unscaled: tl.tensor,
    other_gradient: tl.tensor,
    other_scale: tl.tensor,
    upstream: tl.tensor,
    numel: tl.tensor,
    block: tl.constexpr,
) -> None:
    start = tl.program_id(0).to(tl.int64) * block
    elements = start + tl.arange(0, block)
    factor = tl.load(upstream).to(tl.float32)
    if start + block <= numel:  # unmasked, for 16-byte accesses
        _scale(grad_unscaled, gradient, elements, factor * scale, None)
        if other_grad_unscaled is not None:
            _scale(other_grad_unscaled, other_gradient, elements, factor * other_scale, None)
    else:
        _scale(grad_unscaled, gradient, elements, factor * scale, elements < numel)
        if other_grad_unscaled is not None:
            _scale(other_grad_unscaled, other_gradient, elements, factor * other_scale, elements < numel)


@triton.jit
def _scale(grad_unscaled: tl.tensor, gradient: tl.tensor, elements: tl.tensor, factor: tl.tensor, mask: tl.tensor) -> None:
    store(gradient + elements, tl.load(grad_unscaled + elements, mask=mask).to(tl.float32) * factor, mask)
