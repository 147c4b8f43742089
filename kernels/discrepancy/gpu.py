"""The discrepancies in Triton.

A row is the logits of one sample or pixel. A program holds a tile of rows × classes; where rows fit no tile, it passes
over their classes again and again. Every program leaves a partial sum, and ``_finish_kernel`` adds them in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import Sizes, launch, layout, packed, place, pointers, programs, revealed, store

BLOCK = 2048  # elements of a tile
WHOLE = 8192  # elements of the largest tile that is kept in registers as a whole

Forward = tuple[Tensor, Tensor, Tensor, Tensor]


def l1_forward(student: Tensor, teacher: Tensor, scale: float, gradient: bool, agreement: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See kernels/discrepancy."""
    sign = torch.empty_like(student, dtype=torch.int8) if gradient else None
    sizes, strides = layout(student, teacher, student if sign is None else sign)
    block_rows, block_classes, warps = _tile(sizes, strides[0], BLOCK)
    if not agreement and _is_dense(student) and student.stride() == teacher.stride():  # then rows do not matter
        sizes, strides = (1, 1, student.numel(), 1), [(0, 0, 1, 1)] * 3
        block_rows, block_classes, warps = BLOCK, 1, 4
    count = programs(sizes, block_rows)
    losses, agreements = _partials(student, count, agreement)
    arguments = student, teacher, sign, losses, agreements, *packed(sizes, (student, teacher, sign), strides)
    launch(student, _l1_kernel, (count,), *arguments, block_rows, block_classes, warps=warps)
    loss, agree = _finish(losses, agreements, scale)
    return loss, _or_empty(sign, student, torch.int8), _or_empty(agree, student, torch.int64)


def kl_forward(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    scale: float,
    student_gradient: bool,
    teacher_gradient: bool,
    agreement: bool,
) -> Forward:
    """See kernels/discrepancy."""
    return _divergence(student, teacher, temperature, scale, student_gradient, teacher_gradient, agreement, js=False)


def js_forward(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    scale: float,
    student_gradient: bool,
    teacher_gradient: bool,
    agreement: bool,
) -> Forward:
    """See kernels/discrepancy."""
    return _divergence(student, teacher, temperature, scale, student_gradient, teacher_gradient, agreement, js=True)


def scale_gradients(
    student_unit: Tensor,
    teacher_unit: Tensor,
    upstream: Tensor,
    student_scale: float,
    teacher_scale: float,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See kernels/discrepancy."""
    student_gradient = torch.empty_like(student_unit, dtype=student_dtype)
    teacher_gradient = torch.empty_like(teacher_unit, dtype=teacher_dtype)
    sides = (student_unit, student_gradient, student_scale), (teacher_unit, teacher_gradient, teacher_scale)
    asked = [side for side in sides if side[0].numel()]
    if asked:  # one side alone comes first, so that either is scaled by the same kernel
        numel = asked[0][0].numel()
        other = asked[1] if len(asked) > 1 else (None, None, 0.0)
        launch(upstream, _scale_kernel, (triton.cdiv(numel, BLOCK),), *asked[0], *other, upstream, numel, BLOCK)
    return student_gradient, teacher_gradient


def _divergence(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    scale: float,
    student_gradient: bool,
    teacher_gradient: bool,
    agreement: bool,
    js: bool,
) -> Forward:
    student_unit = torch.empty_like(student) if student_gradient else None
    teacher_unit = torch.empty_like(teacher) if teacher_gradient else None
    units = (student if student_unit is None else student_unit, teacher if teacher_unit is None else teacher_unit)
    sizes, strides = layout(student, teacher, *units)
    block_rows, block_classes, warps = _tile(sizes, strides[0], WHOLE)
    whole = block_classes >= sizes[3]
    if not whole:
        block_rows, block_classes, warps = _tile(sizes, strides[0], BLOCK)
    count = programs(sizes, block_rows)
    losses, agreements = _partials(student, count, agreement)
    kernel = _whole_rows_kernel if whole else _long_rows_kernel
    tensors = student, teacher, student_unit, teacher_unit
    arguments = *tensors, losses, agreements, *packed(sizes, tensors, strides), 1 / temperature
    launch(student, kernel, (count,), *arguments, js, block_rows, block_classes, warps=warps, fuse=False)
    loss, agree = _finish(losses, agreements, scale)
    return (
        loss,
        _or_empty(student_unit, student, student.dtype),
        _or_empty(teacher_unit, teacher, teacher.dtype),
        _or_empty(agree, student, torch.int64),
    )


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)


def _tile(sizes: Sizes, strides: Sizes, elements: int) -> tuple[int, int, int]:
    """Rows, classes and warps of a tile: whole rows if they fit into ``elements``.

    All follow from the classes and from what is dense in memory, because a kernel is compiled for each combination.
    """
    side_by_side = 32 if 0 < strides[2] <= strides[3] else 1  # so many rows as make a warp's accesses dense in memory
    classes = next((classes for classes in (16, 32, 128, 512) if classes >= sizes[3]), triton.next_power_of_2(sizes[3]))
    classes = min(classes, max(elements // side_by_side, 1))
    rows = max(side_by_side, 1024 // classes)
    # A warp that reads rows side by side takes all their classes, and no sum goes through shared memory.
    warps = rows * classes // (1024 if side_by_side > 1 else 256)
    return rows, classes, min(max(warps, 1), 8)


def _partials(logits: Tensor, count: int, agreement: bool) -> tuple[Tensor, Tensor | None]:
    return logits.new_empty(count, dtype=torch.float32), logits.new_empty(count, dtype=torch.int32) if agreement else None


def _finish(losses: Tensor, agreements: Tensor | None, scale: float) -> tuple[Tensor, Tensor | None]:
    loss = losses.new_empty(())
    agree = None if agreements is None else agreements.new_empty((), dtype=torch.int64)
    launch(losses, _finish_kernel, (1,), losses, agreements, loss, agree, losses.numel(), scale, 1024)
    return loss, agree


def _or_empty(result: Tensor | None, logits: Tensor, dtype: torch.dtype) -> Tensor:
    return logits.new_empty(0, dtype=dtype) if result is None else result


@triton.jit(do_not_specialize=["student", "teacher", "sign"])
def _l1_kernel(
    student: tl.tensor,
    teacher: tl.tensor,
    sign: tl.tensor,
    losses: tl.tensor,
    agreements: tl.tensor,
    sizes: tl.tuple,
    student_strides: tl.tuple,
    teacher_strides: tl.tuple,
    sign_strides: tl.tuple,
    accesses: tl.constexpr,
    block_rows: tl.constexpr,
    block_classes: tl.constexpr,
) -> None:
    sizes = revealed(sizes, accesses)
    program = tl.program_id(0)
    group, rows = place(program, sizes, block_rows)
    real = rows < sizes[2]
    total = tl.zeros((block_rows,), tl.float32)
    s_max = tl.full((block_rows,), -float("inf"), tl.float32)
    t_max = s_max
    s_top = tl.zeros((block_rows,), tl.int32)
    t_top = s_top
    for start in range(0, sizes[3], block_classes):
        classes = start + tl.arange(0, block_classes)
        mask = real[:, None] & (classes < sizes[3])[None, :]
        s = tl.load(pointers(student, group, rows, classes, sizes, student_strides, accesses, 0), mask=mask, other=0).to(tl.float32)
        t = tl.load(pointers(teacher, group, rows, classes, sizes, teacher_strides, accesses, 1), mask=mask, other=0).to(tl.float32)
        difference = s - t
        total += tl.sum(tl.abs(difference), axis=1)
        if sign is not None:
            signs = (difference > 0).to(tl.int8) - (difference < 0).to(tl.int8)
            tl.store(pointers(sign, group, rows, classes, sizes, sign_strides, accesses, 2), signs, mask=mask)
        if agreements is not None:
            s_max, s_top = _higher(s_max, s_top, tl.where(mask, s, -float("inf")), classes)
            t_max, t_top = _higher(t_max, t_top, tl.where(mask, t, -float("inf")), classes)
    tl.store(losses + program, tl.sum(total))
    if agreements is not None:
        tl.store(agreements + program, _agreeing(s_top, t_top, real))


@triton.jit(do_not_specialize=["student", "teacher", "student_unit", "teacher_unit"])
def _whole_rows_kernel(
    student: tl.tensor,
    teacher: tl.tensor,
    student_unit: tl.tensor,
    teacher_unit: tl.tensor,
    losses: tl.tensor,
    agreements: tl.tensor,
    sizes: tl.tuple,
    student_strides: tl.tuple,
    teacher_strides: tl.tuple,
    student_unit_strides: tl.tuple,
    teacher_unit_strides: tl.tuple,
    accesses: tl.constexpr,
    inverse_temperature: tl.tensor,
    js: tl.constexpr,
    block_rows: tl.constexpr,
    block_classes: tl.constexpr,
) -> None:
    sizes = revealed(sizes, accesses)
    program = tl.program_id(0)
    group, rows = place(program, sizes, block_rows)
    real = rows < sizes[2]
    classes = tl.arange(0, block_classes)
    mask = real[:, None] & (classes < sizes[3])[None, :]
    s = _logits(pointers(student, group, rows, classes, sizes, student_strides, accesses, 0), real, classes, sizes)
    t = _logits(pointers(teacher, group, rows, classes, sizes, teacher_strides, accesses, 1), real, classes, sizes)
    s_max = tl.max(s, axis=1)
    t_max = tl.max(t, axis=1)
    if agreements is not None:
        agree = _agreeing(_top(s, s_max, classes), _top(t, t_max, classes), real)
        tl.store(agreements + program, agree)

    log_q = (s - s_max[:, None]) * inverse_temperature  # the maximum goes first: logits of 10⁴ lose nothing by it
    log_p = (t - t_max[:, None]) * inverse_temperature
    q = tl.exp(log_q)
    p = tl.exp(log_p)
    q_norm = tl.sum(q, axis=1)[:, None]
    p_norm = tl.sum(p, axis=1)[:, None]
    log_q -= tl.log(q_norm)
    log_p -= tl.log(p_norm)
    q *= 1 / q_norm
    p *= 1 / p_norm
    loss, q_sum, p_sum = _sums(log_q, log_p, q, p, js)
    tl.store(losses + program, tl.sum(loss))
    for_student, for_teacher = _units(log_q, log_p, q, p, q_sum, p_sum, inverse_temperature, js)
    if student_unit is not None:
        store(pointers(student_unit, group, rows, classes, sizes, student_unit_strides, accesses, 2), for_student, mask)
    if teacher_unit is not None:
        store(pointers(teacher_unit, group, rows, classes, sizes, teacher_unit_strides, accesses, 3), for_teacher, mask)


@triton.jit(do_not_specialize=["student", "teacher", "student_unit", "teacher_unit"])
def _long_rows_kernel(
    student: tl.tensor,
    teacher: tl.tensor,
    student_unit: tl.tensor,
    teacher_unit: tl.tensor,
    losses: tl.tensor,
    agreements: tl.tensor,
    sizes: tl.tuple,
    student_strides: tl.tuple,
    teacher_strides: tl.tuple,
    student_unit_strides: tl.tuple,
    teacher_unit_strides: tl.tuple,
    accesses: tl.constexpr,
    inverse_temperature: tl.tensor,
    js: tl.constexpr,
    block_rows: tl.constexpr,
    block_classes: tl.constexpr,
) -> None:
    sizes = revealed(sizes, accesses)
    program = tl.program_id(0)
    group, rows = place(program, sizes, block_rows)
    real = rows < sizes[2]
    s_max = tl.full((block_rows,), -float("inf"), tl.float32)
    t_max = s_max
    q_norm = tl.zeros((block_rows,), tl.float32)
    p_norm = q_norm
    s_top = tl.zeros((block_rows,), tl.int32)
    t_top = s_top
    for start in range(0, sizes[3], block_classes):
        classes = start + tl.arange(0, block_classes)
        s = _logits(pointers(student, group, rows, classes, sizes, student_strides, accesses, 0), real, classes, sizes)
        t = _logits(pointers(teacher, group, rows, classes, sizes, teacher_strides, accesses, 1), real, classes, sizes)
        q_norm = _norm(s_max, q_norm, s, inverse_temperature)
        p_norm = _norm(t_max, p_norm, t, inverse_temperature)
        s_max, s_top = _higher(s_max, s_top, s, classes)
        t_max, t_top = _higher(t_max, t_top, t, classes)
    if agreements is not None:
        tl.store(agreements + program, _agreeing(s_top, t_top, real))

    log_q_norm = tl.log(q_norm)
    log_p_norm = tl.log(p_norm)
    loss = tl.zeros((block_rows,), tl.float32)
    q_sum = loss
    p_sum = loss
    for start in range(0, sizes[3], block_classes):
        classes = start + tl.arange(0, block_classes)
        s = _logits(pointers(student, group, rows, classes, sizes, student_strides, accesses, 0), real, classes, sizes)
        t = _logits(pointers(teacher, group, rows, classes, sizes, teacher_strides, accesses, 1), real, classes, sizes)
        log_q = (s - s_max[:, None]) * inverse_temperature - log_q_norm[:, None]
        log_p = (t - t_max[:, None]) * inverse_temperature - log_p_norm[:, None]
        part, q_part, p_part = _sums(log_q, log_p, tl.exp(log_q), tl.exp(log_p), js)
        loss += part
        q_sum += q_part
        p_sum += p_part
    tl.store(losses + program, tl.sum(loss))

    if student_unit is not None or teacher_unit is not None:
        for start in range(0, sizes[3], block_classes):
            classes = start + tl.arange(0, block_classes)
            mask = real[:, None] & (classes < sizes[3])[None, :]
            s = _logits(pointers(student, group, rows, classes, sizes, student_strides, accesses, 0), real, classes, sizes)
            t = _logits(pointers(teacher, group, rows, classes, sizes, teacher_strides, accesses, 1), real, classes, sizes)
            log_q = (s - s_max[:, None]) * inverse_temperature - log_q_norm[:, None]
            log_p = (t - t_max[:, None]) * inverse_temperature - log_p_norm[:, None]
            for_student, for_teacher = _units(log_q, log_p, tl.exp(log_q), tl.exp(log_p), q_sum, p_sum, inverse_temperature, js)
            if student_unit is not None:
                store(pointers(student_unit, group, rows, classes, sizes, student_unit_strides, accesses, 2), for_student, mask)
            if teacher_unit is not None:
                store(pointers(teacher_unit, group, rows, classes, sizes, teacher_unit_strides, accesses, 3), for_teacher, mask)


@triton.jit
def _logits(pointers: tl.tensor, real: tl.tensor, classes: tl.tensor, sizes: tl.tuple) -> tl.tensor:
    """Logits in float32: −∞ beyond the last class, where softmax is then 0, and 0 beyond the last row. Neither adds to a sum."""
    mask = (classes < sizes[3])[None, :]
    logits = tl.load(pointers, mask=real[:, None] & mask, other=0).to(tl.float32)
    return tl.where(mask, logits, -float("inf"))


@triton.jit
def _norm(maximum: tl.tensor, norm: tl.tensor, logits: tl.tensor, inverse_temperature: tl.tensor) -> tl.tensor:
    """The sum of exponentials relative to the maximum, with more logits taken in."""
    higher = tl.maximum(maximum, tl.max(logits, axis=1))
    higher = tl.where(higher == -float("inf"), 0, higher)  # −∞ − −∞ is NaN, and greater logits may follow
    more = tl.sum(tl.exp((logits - higher[:, None]) * inverse_temperature), axis=1)
    return norm * tl.exp((maximum - higher) * inverse_temperature) + more


@triton.jit
def _sums(log_q: tl.tensor, log_p: tl.tensor, q: tl.tensor, p: tl.tensor, js: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Every row's loss, and the expected log ratios of q and p that its derivatives are centred on."""
    q_ratio, p_ratio = _log_ratios(log_q, log_p, q, p, js)
    p_sum = tl.sum(p * p_ratio, axis=1)
    q_sum = p_sum
    loss = p_sum
    if js:
        q_sum = tl.sum(q * q_ratio, axis=1)
        loss = 0.5 * (p_sum + q_sum)
    else:
        loss = tl.sum(_kl_terms(q, p, p_ratio), axis=1)
    return loss, q_sum, p_sum


@triton.jit
def _kl_terms(q: tl.tensor, p: tl.tensor, d: tl.tensor) -> tl.tensor:
    """p d + (q − p) for d = log p − log q: over a row, q − p adds up to 0.

    Every term is ≥ 0, and an error of d common to a row cancels, as it does not from p d. Near 0 by the series of d + exp(−d) − 1.
    """
    near = p * (d * d) * (1 / 2 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d * (1 / 720)))))
    return tl.where(tl.abs(d) < 0.25, near, p * d + (q - p))


@triton.jit
def _units(
    log_q: tl.tensor,
    log_p: tl.tensor,
    q: tl.tensor,
    p: tl.tensor,
    q_sum: tl.tensor,
    p_sum: tl.tensor,
    inverse_temperature: tl.tensor,
    js: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The loss's derivatives by the student's and the teacher's logits."""
    q_ratio, p_ratio = _log_ratios(log_q, log_p, q, p, js)
    for_student = q - p
    for_teacher = p * (p_ratio - p_sum[:, None])
    if js:
        for_student = 0.5 * q * (q_ratio - q_sum[:, None])
        for_teacher *= 0.5
    return for_student * inverse_temperature, for_teacher * inverse_temperature


@triton.jit
def _log_ratios(log_q: tl.tensor, log_p: tl.tensor, q: tl.tensor, p: tl.tensor, js: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """log q − log m and log p − log m for JS, where m = (p + q)/2; log p − log q as the second for KL.

    They are finite where a probability of 0, which multiplies them, would make them infinite.
    """
    difference = log_p - log_q
    if js:
        difference = tl.where(q == 0, 1e30, difference)
    difference = tl.where(p == 0, -1e30, difference)
    q_ratio = difference
    p_ratio = difference
    if js:
        # From the difference alone, not from log m: nothing cancels, and equal logits give exactly 0.
        size = tl.abs(difference)
        square = size * size
        near = square * (1 / 8 - square * (1 / 192 - square * (1 / 2880))) - 0.5 * size
        log_mean = tl.where(size < 0.25, near, tl.log(0.5 + 0.5 * tl.exp(-size)))  # of m relative to the larger of p and q
        q_ratio = tl.minimum(-difference, 0) - log_mean
        p_ratio = tl.minimum(difference, 0) - log_mean
    return q_ratio, p_ratio


@triton.jit
def _top(logits: tl.tensor, maximum: tl.tensor, classes: tl.tensor) -> tl.tensor:
    """The class of every row that argmax finds: the first maximum; less 2³⁰ if it is the first NaN, which wins over all else."""
    first = tl.where(logits == maximum[:, None], classes[None, :], 2**30)
    return tl.min(tl.where(logits != logits, classes[None, :] - 2**30, first), axis=1)


@triton.jit
def _higher(maximum: tl.tensor, top: tl.tensor, logits: tl.tensor, classes: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The maximum and its class, with more logits taken in."""
    new_maximum = tl.max(logits, axis=1)
    new_top = _top(logits, new_maximum, classes)
    wins = (top >= 0) & ((new_top < 0) | (new_maximum > maximum))
    return tl.maximum(maximum, new_maximum), tl.where(wins, new_top, top)


@triton.jit
def _agreeing(s_top: tl.tensor, t_top: tl.tensor, real: tl.tensor) -> tl.tensor:
    same = (s_top & (2**30 - 1)) == (t_top & (2**30 - 1))
    return tl.sum((same & real).to(tl.int32))


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
    unit: tl.tensor,
    gradient: tl.tensor,
    scale: tl.tensor,
    other_unit: tl.tensor,
    other_gradient: tl.tensor,
    other_scale: tl.tensor,
    upstream: tl.tensor,
    numel: tl.tensor,
    block: tl.constexpr,
) -> None:
    start = tl.program_id(0).to(tl.int64) * block
    elements = start + tl.arange(0, block)
    factor = tl.load(upstream).to(tl.float32)
    if start + block <= numel:  # no mask, so that accesses are 16 bytes wide
        _scale(unit, gradient, elements, factor * scale, None)
        if other_unit is not None:
            _scale(other_unit, other_gradient, elements, factor * other_scale, None)
    else:
        _scale(unit, gradient, elements, factor * scale, elements < numel)
        if other_unit is not None:
            _scale(other_unit, other_gradient, elements, factor * other_scale, elements < numel)


@triton.jit
def _scale(unit: tl.tensor, gradient: tl.tensor, elements: tl.tensor, factor: tl.tensor, mask: tl.tensor) -> None:
    store(gradient + elements, tl.load(unit + elements, mask=mask).to(tl.float32) * factor, mask)
