"""How far a student's logits are from its teacher's.

The fused backends compute the gradients for both sides while they read the logits, and keep them, unscaled, for the
backward pass: those of L1 as signs of one byte, those of the divergences in the logits' dtype.
"""

import math
from numbers import Real
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import operators
from ..dispatch import Backend, choose
from . import reference

__all__ = ["Reduction", "js_discrepancy", "kl_discrepancy", "l1_discrepancy"]

Reduction = Literal["batchmean", "mean", "sum"]
TEMPERATURES = 1e-4, 1e4  # beyond them log-ratios, or the square times a divergence, leave what float32 resolves


@overload
def l1_discrepancy(student: Tensor, teacher: Tensor, *, reduction: Reduction, agreement: Literal[False] = False) -> Tensor: ...
@overload
def l1_discrepancy(student: Tensor, teacher: Tensor, *, reduction: Reduction, agreement: Literal[True]) -> tuple[Tensor, Tensor]: ...
def l1_discrepancy(student: Tensor, teacher: Tensor, *, reduction: Reduction, agreement: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Sum or mean of ``|student − teacher|`` over raw logits (DFAD, arXiv 1912.11006, eq. 1).

    Args:
        student, teacher: logits (N, C) or (N, C, H, W) of any strides and floating dtypes; read in float32.
        reduction: "mean" divides by every element, "batchmean" by N, "sum" by nothing. Without rows the sum is 0, and a mean
            NaN, as in PyTorch.
        agreement: also count the rows (of N, or of N·H·W) whose largest logits are of the same class.

    Returns:
        A 0-d tensor, float32 (float64 for float64 logits), differentiable on both sides, once; under
        ``use_backend("reference")`` any number of times. NaN, as in PyTorch, where a logit is NaN or both sides have the same
        infinity. With ``agreement`` also the count, a 0-d int64 tensor on the logits' device.

    Raises:
        ValueError: shapes that differ or are no logits, devices that differ, a dtype that is not floating, or an unknown
            reduction.
        TypeError: logits that are no tensors, or an ``agreement`` that is not a bool.
        BackendError: a forced backend does not serve the logits' device or dtype.
        RuntimeError: a backward pass with ``create_graph=True`` through a fused backend.
    """
    return _discrepancy("l1", student, teacher, reduction, agreement)


@overload
def kl_discrepancy(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float,
    reduction: Reduction,
    scale_by_temperature_squared: bool,
    agreement: Literal[False] = False,
) -> Tensor: ...
@overload
def kl_discrepancy(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float,
    reduction: Reduction,
    scale_by_temperature_squared: bool,
    agreement: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def kl_discrepancy(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float,
    reduction: Reduction,
    scale_by_temperature_squared: bool,
    agreement: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """KL(p_teacher ‖ p_student) of the softmax over classes at a temperature (Hinton et al. 2015, arXiv 1503.02531).

    A logit of −inf masks its class. A class of teacher probability 0 contributes 0 to the value and to the teacher's
    gradient, whatever the student gives it. Where the student alone masks a class, the value is +inf, and the teacher's
    gradient is not finite. A NaN or +inf logit, or a row of −inf, makes value and gradients NaN, all as in PyTorch.

    Args:
        student, teacher: logits (N, C) or (N, C, H, W) of any strides and floating dtypes; read in float32.
        temperature: both logits are divided by it, from 1e-4 to 1e4.
        reduction: "batchmean" divides by N, "mean" by every element, "sum" by nothing. Without rows the sum is 0, and a mean
            NaN, as in PyTorch.
        scale_by_temperature_squared: multiply by temperature², which keeps the size of the gradient as
            the temperature changes.
        agreement: also count the rows (of N, or of N·H·W) whose largest logits are of the same class.

    Returns:
        A 0-d tensor in nats, float32 (float64 for float64 logits), differentiable on both sides, once; under
        ``use_backend("reference")`` any number of times. With ``agreement`` also the count, a 0-d int64 tensor on the
        logits' device.

    Raises:
        ValueError: shapes that differ or are no logits, devices that differ, a dtype that is not floating, a temperature
            out of its range, or an unknown reduction.
        TypeError: logits that are no tensors, a temperature that is not a number (a tensor is none), or a switch that is not
            a bool.
        BackendError: a forced backend does not serve the logits' device or dtype.
        RuntimeError: a backward pass with ``create_graph=True`` through a fused backend.
    """
    return _discrepancy("kl", student, teacher, reduction, agreement, temperature, scale_by_temperature_squared)


@overload
def js_discrepancy(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float,
    reduction: Reduction,
    scale_by_temperature_squared: bool,
    agreement: Literal[False] = False,
) -> Tensor: ...
@overload
def js_discrepancy(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float,
    reduction: Reduction,
    scale_by_temperature_squared: bool,
    agreement: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def js_discrepancy(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float,
    reduction: Reduction,
    scale_by_temperature_squared: bool,
    agreement: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Jensen–Shannon divergence ½ KL(p_T ‖ m) + ½ KL(p_S ‖ m), m = ½ (p_T + p_S), between 0 and log 2 a row (Lin 1991).

    Arguments, results and errors are those of ``kl_discrepancy``, but that a class which one side alone masks contributes
    ½ log 2 times its probability on the other: value and gradients are finite. One minus this, over log 2, is what
    DeepInversion (arXiv 1912.08795, eq. 8) and PRE-DFKD compete with.
    """
    return _discrepancy("js", student, teacher, reduction, agreement, temperature, scale_by_temperature_squared)


def _discrepancy(
    kind: Literal["l1", "kl", "js"],
    student: Tensor,
    teacher: Tensor,
    reduction: Reduction,
    agreement: bool,
    temperature: float | None = None,
    scale_by_temperature_squared: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    _check(student, teacher, reduction, agreement)
    factor = 1.0
    if kind != "l1":
        temperature = _temperature(temperature)
        _check_switch("scale_by_temperature_squared", scale_by_temperature_squared)
        factor = temperature**2 if scale_by_temperature_squared else 1.0
    backend = choose(f"{kind}_discrepancy", student.device, (student.dtype, teacher.dtype), 2 * student.numel())
    if backend == "reference":
        loss = reference.discrepancy(kind, student, teacher, temperature, reduction)
        loss = loss * factor if scale_by_temperature_squared else loss
        return (loss, reference.agreement(student, teacher)) if agreement else loss
    scale = _scale(student, reduction) * factor
    loss, count = _Fused.apply(student, teacher, f"{kind}_forward", backend, temperature, scale, agreement)
    return (loss, count) if agreement else loss


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, name: str, backend: Backend, temperature: float | None, scale: float, agreement: bool
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[:2]
        operator = operators.operator(name, backend, student)
        if temperature is None:
            loss, sign, count = operator(student, teacher, scale, any(wanted), agreement)
            units = tuple(sign if side else sign.new_empty(0) for side in wanted)
            ctx.scales = scale, -scale
        else:
            loss, *units, count = operator(student, teacher, temperature, scale, *wanted, agreement)
            ctx.scales = scale, scale
        ctx.save_for_backward(*units)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(count)
        ctx.backend, ctx.dtypes = backend, (student.dtype, teacher.dtype)
        return loss, count

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor) -> tuple[Tensor | None, ...]:
        # Refused already here: not every second derivative would pass this node, and one that does not would lack a term.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"create_graph=True: a discrepancy of the backend {ctx.backend} has no second derivative;"
                ' compute it under use_backend("reference")'
            )
        if upstream is None:
            return 7 * (None,)
        units, wanted = ctx.saved_tensors, ctx.needs_input_grad[:2]
        if _last_use() and all(unit.dtype == dtype == torch.float32 for unit, dtype in zip(units, ctx.dtypes, strict=True)):
            # Nobody reads the units again: no second pair of logits-sized tensors is needed. In half precision
            # PyTorch would round the factor.
            factor = upstream * ctx.scales[0]
            return *(unit.mul_(factor) if side else None for unit, side in zip(units, wanted, strict=True)), *5 * [None]
        scale_gradients = operators.operator("scale_gradients", ctx.backend, upstream)
        gradients = scale_gradients(*units, upstream, *ctx.scales, *ctx.dtypes)
        return *(gradient if side else None for gradient, side in zip(gradients, wanted, strict=True)), *5 * [None]


def _last_use() -> bool:
    """Whether this backward pass frees the graph, and with it what was saved: no ``retain_graph``, no compilation."""
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return not torch.compiler.is_compiling() and keeps_graph is not None and not keeps_graph()


def _check(student: Tensor, teacher: Tensor, reduction: object, agreement: object) -> None:
    sides: tuple[tuple[str, object], ...] = ("student", student), ("teacher", teacher)
    for side, logits in sides:
        if not isinstance(logits, Tensor):
            raise TypeError(f"{side} must be a tensor of logits, not a {type(logits).__name__}")
        if not logits.is_floating_point():
            raise ValueError(f"{side} logits must have a floating-point dtype, not {logits.dtype}")
        if logits.layout != torch.strided:
            raise ValueError(f"{side} logits must be dense, not {logits.layout}")
    if student.shape != teacher.shape:
        raise ValueError(f"student and teacher logits differ in shape: {tuple(student.shape)} and {tuple(teacher.shape)}")
    if student.device != teacher.device:
        raise ValueError(f"student and teacher logits differ in device: {student.device} and {teacher.device}")
    if student.ndim not in (2, 4):
        raise ValueError(f"logits must be (N, C) or (N, C, H, W), not {tuple(student.shape)}")
    if student.shape[1] == 0:
        raise ValueError(f"logits have no classes: {tuple(student.shape)}")
    if not isinstance(reduction, str) or reduction not in ("batchmean", "mean", "sum"):
        raise ValueError(f"reduction must be 'batchmean', 'mean' or 'sum', not {reduction!r}")
    _check_switch("agreement", agreement)


def _temperature(temperature: object) -> float:
    # Reading a tensor would wait for its device, and a CUDA graph would keep the value of its capture.
    if isinstance(temperature, bool) or not isinstance(temperature, Real):
        raise TypeError(f"temperature must be a float, not {temperature!r}")
    lowest, highest = TEMPERATURES
    if not lowest <= (number := float(temperature)) <= highest:
        raise ValueError(f"temperature must be > 0, from {lowest:g} to {highest:g}, not {temperature}")
    return number


def _check_switch(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")


def _scale(logits: Tensor, reduction: Reduction) -> float:
    """What the sum is multiplied by; the mean of nothing is NaN, as PyTorch has it."""
    count = {"mean": logits.numel(), "batchmean": len(logits), "sum": 1}[reduction]
    return 1.0 / count if count else math.nan


def _fake_scalar(logits: Tensor, dtype: torch.dtype, wanted: bool = True) -> Tensor:
    return logits.new_empty(() if wanted else 0, dtype=dtype)


def _fake_unit(logits: Tensor, dtype: torch.dtype, wanted: bool) -> Tensor:
    return torch.empty_like(logits, dtype=dtype) if wanted else logits.new_empty(0, dtype=dtype)


def _fake_l1(student: Tensor, teacher: Tensor, scale: float, gradient: bool, agreement: bool) -> tuple[Tensor, Tensor, Tensor]:
    sign = _fake_unit(student, torch.int8, gradient)
    return _fake_scalar(student, torch.float32), sign, _fake_scalar(student, torch.int64, agreement)


def _fake_divergence(
    student: Tensor, teacher: Tensor, temperature: float, scale: float, student_gradient: bool, teacher_gradient: bool, agreement: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    units = _fake_unit(student, student.dtype, student_gradient), _fake_unit(teacher, teacher.dtype, teacher_gradient)
    return _fake_scalar(student, torch.float32), *units, _fake_scalar(student, torch.int64, agreement)


def _fake_scale_gradients(
    student_grad_unscaled: Tensor,
    teacher_grad_unscaled: Tensor,
    upstream: Tensor,
    student_scale: float,
    teacher_scale: float,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(student_grad_unscaled, dtype=student_dtype), torch.empty_like(teacher_grad_unscaled, dtype=teacher_dtype)


operators.define(
    __name__,
    "l1_forward",
    "(Tensor student, Tensor teacher, float scale, bool gradient, bool agreement) -> (Tensor, Tensor, Tensor)",
    _fake_l1,
)
for _name in ("kl_forward", "js_forward"):
    operators.define(
        __name__,
        _name,
        "(Tensor student, Tensor teacher, float temperature, float scale, bool student_gradient, bool teacher_gradient, bool agreement)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        _fake_divergence,
    )
operators.define(
    __name__,
    "scale_gradients",
    "(Tensor student_grad_unscaled, Tensor teacher_grad_unscaled, Tensor upstream, float student_scale, float teacher_scale,"
    " ScalarType student_dtype, ScalarType teacher_dtype) -> (Tensor, Tensor)",
    _fake_scale_gradients,
)
