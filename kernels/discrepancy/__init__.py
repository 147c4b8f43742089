"""Discrepancies between the logits of a student and a teacher: L1, Kullback–Leibler and Jensen–Shannon.

The fused backends compute the gradients for both sides in the forward pass and save them, before multiplication by the upstream
gradient: int8 signs for L1, the dtype of the logits for the divergences.
"""

import math
from numbers import Real
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import operators
from ..checks import require_bools, require_tensors, shown
from ..dispatch import Backend, choose
from . import reference

__all__ = ["Reduction", "js_discrepancy", "kl_discrepancy", "l1_discrepancy"]

Reduction = Literal["batchmean", "mean", "sum"]
TEMPERATURES = 1e-4, 1e4  # outside this range, log ratios or temperature² · divergence exceed the precision of float32


@overload
def l1_discrepancy(student: Tensor, teacher: Tensor, *, reduction: Reduction, agreement: Literal[False] = False) -> Tensor: ...
@overload
def l1_discrepancy(student: Tensor, teacher: Tensor, *, reduction: Reduction, agreement: Literal[True]) -> tuple[Tensor, Tensor]: ...
def l1_discrepancy(student: Tensor, teacher: Tensor, *, reduction: Reduction, agreement: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the L1 distance ``|student − teacher|`` between logits (DFAD, arXiv 1912.11006, eq. 1).

    Args:
        student: student logits (N, C) or (N, C, H, W) of any floating-point dtype and strides; computed in float32.
        teacher: teacher logits, of the same shape and device.
        reduction: "batchmean" divides the sum by N, "mean" by the number of elements, "sum" does not divide. For empty
            logits, the sum is 0 and the means are NaN, as in PyTorch.
        agreement: also count the rows (samples or pixels) in which student and teacher have the same argmax.

    Returns:
        The loss, a 0-d float32 tensor (float64 for float64 logits), differentiable with respect to both logits; double backward
        requires ``use_backend("reference")``. NaN where a logit is NaN or both logits are the same infinity, as in PyTorch. With
        ``agreement``, a tuple of the loss and the count, a 0-d int64 tensor.

    Raises:
        ValueError: invalid or different shapes, different devices, a dtype that is not floating-point, or an unknown reduction.
        TypeError: logits that are not tensors, or ``agreement`` is not a bool.
        BackendError: a forced backend does not support the device or dtype.
        RuntimeError: a backward pass with ``create_graph=True`` through a fused backend.

    Examples:
        >>> import torch
        >>> from dfkd_fast.kernels import l1_discrepancy
        >>> student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]])
        >>> l1_discrepancy(student, teacher, reduction="mean")
        tensor(1.5000)
        >>> l1_discrepancy(student, teacher, reduction="sum", agreement=True)
        (tensor(3.), tensor(0))
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
    """Compute the Kullback–Leibler divergence KL(p_teacher ‖ p_student) with temperature (Hinton et al. 2015, arXiv 1503.02531).

    p = softmax(logits / temperature) over the classes. A logit of −inf masks its class. A class with teacher probability 0
    contributes 0 to the loss and to the teacher's gradient. If only the student masks a class, the loss is +inf and the teacher's
    gradient is not finite. A NaN or +inf logit, or a row of −inf, makes loss and gradients NaN. All as in PyTorch.

    Args:
        student: student logits (N, C) or (N, C, H, W) of any floating-point dtype and strides; computed in float32.
        teacher: teacher logits, of the same shape and device.
        temperature: divisor of both logits, from 1e-4 to 1e4.
        reduction: "batchmean" divides the sum by N, "mean" by the number of elements, "sum" does not divide. For empty
            logits, the sum is 0 and the means are NaN, as in PyTorch.
        scale_by_temperature_squared: multiply by temperature², so that the size of the gradients does not depend on the
            temperature.
        agreement: also count the rows (samples or pixels) in which student and teacher have the same argmax.

    Returns:
        The loss in nats, a 0-d float32 tensor (float64 for float64 logits), differentiable with respect to both logits; double
        backward requires ``use_backend("reference")``. With ``agreement``, a tuple of the loss and the count, a 0-d int64 tensor.

    Raises:
        ValueError: invalid or different shapes, different devices, a dtype that is not floating-point, a temperature outside its
            range, or an unknown reduction.
        TypeError: logits that are not tensors, a temperature that is not a Python number, or a flag that is not a bool.
        BackendError: a forced backend does not support the device or dtype.
        RuntimeError: a backward pass with ``create_graph=True`` through a fused backend.

    Examples:
        >>> import torch
        >>> from dfkd_fast.kernels import kl_discrepancy
        >>> student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
        >>> loss = kl_discrepancy(student, teacher, temperature=4.0, reduction="batchmean", scale_by_temperature_squared=True)
        >>> loss.backward()
        >>> student.grad.shape
        torch.Size([8, 10])
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
    """Compute the Jensen–Shannon divergence ½ KL(p_T ‖ m) + ½ KL(p_S ‖ m), where m = ½ (p_T + p_S) (Lin 1991).

    p = softmax(logits / temperature) over the classes; T is the teacher, S the student. The divergence of a row is between 0 and
    log 2. A class masked (−inf) by one side only contributes ½ log 2 times its probability on the other side, so that loss and
    gradients are finite. Used for the competition term of DeepInversion (arXiv 1912.08795, eq. 8) and PRE-DFKD.

    Args:
        student: student logits (N, C) or (N, C, H, W) of any floating-point dtype and strides; computed in float32.
        teacher: teacher logits, of the same shape and device.
        temperature: divisor of both logits, from 1e-4 to 1e4.
        reduction: "batchmean" divides the sum by N, "mean" by the number of elements, "sum" does not divide. For empty
            logits, the sum is 0 and the means are NaN, as in PyTorch.
        scale_by_temperature_squared: multiply by temperature², so that the size of the gradients does not depend on the
            temperature.
        agreement: also count the rows (samples or pixels) in which student and teacher have the same argmax.

    Returns:
        The loss in nats, a 0-d float32 tensor (float64 for float64 logits), differentiable with respect to both logits; double
        backward requires ``use_backend("reference")``. With ``agreement``, a tuple of the loss and the count, a 0-d int64 tensor.

    Raises:
        ValueError: invalid shapes, devices, dtypes, temperature or reduction, as for ``kl_discrepancy``.
        TypeError: an argument of the wrong type, as for ``kl_discrepancy``.
        BackendError: a forced backend does not support the device or dtype.
        RuntimeError: a backward pass with ``create_graph=True`` through a fused backend.

    Examples:
        >>> import torch
        >>> from dfkd_fast.kernels import js_discrepancy
        >>> student, teacher = torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]])
        >>> js_discrepancy(student, teacher, temperature=1.0, reduction="sum", scale_by_temperature_squared=False)
        tensor(0.6931)
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
        require_bools(scale_by_temperature_squared=scale_by_temperature_squared)
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
        needs_grad = ctx.needs_input_grad[:2]
        operator = operators.operator(name, backend, student)
        if temperature is None:
            loss, sign, count = operator(student, teacher, scale, any(needs_grad), agreement)
            grads_unscaled = tuple(sign if needed else sign.new_empty(0) for needed in needs_grad)
            ctx.scales = scale, -scale
        else:
            loss, *grads_unscaled, count = operator(student, teacher, temperature, scale, *needs_grad, agreement)
            ctx.scales = scale, scale
        ctx.save_for_backward(*grads_unscaled)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(count)
        ctx.backend, ctx.dtypes = backend, (student.dtype, teacher.dtype)
        return loss, count

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor) -> tuple[Tensor | None, ...]:
        # Raised here already: a double backward that does not pass through this node would silently lack a term.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"create_graph=True: a discrepancy of the backend {ctx.backend} has no second derivative;"
                ' compute it under use_backend("reference")'
            )
        if upstream is None:
            return 7 * (None,)
        gradients, needs_grad = ctx.saved_tensors, ctx.needs_input_grad[:2]
        same_dtypes = tuple(gradient.dtype for gradient in gradients) == ctx.dtypes
        # On a CPU, new half-precision gradients take less time.
        if same_dtypes and _last_use() and (ctx.backend != "numba" or set(ctx.dtypes) == {torch.float32}):
            # The saved gradients are not used again, so they are scaled in place.
            operators.operator("scale_gradients_", ctx.backend, upstream)(*gradients, upstream, *ctx.scales)
        else:
            scale_gradients = operators.operator("scale_gradients", ctx.backend, upstream)
            gradients = scale_gradients(*gradients, upstream, *ctx.scales, *ctx.dtypes)
        return *(gradient if needed else None for gradient, needed in zip(gradients, needs_grad, strict=True)), *5 * [None]


def _last_use() -> bool:
    """Return whether this backward pass frees the graph and its saved tensors: no ``retain_graph``, no compilation."""
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return not torch.compiler.is_compiling() and keeps_graph is not None and not keeps_graph()


def _check(student: Tensor, teacher: Tensor, reduction: object, agreement: object) -> None:
    require_tensors(student=student, teacher=teacher)
    for side, logits in (("student", student), ("teacher", teacher)):
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
        raise ValueError(f"reduction must be 'batchmean', 'mean' or 'sum', not {shown(reduction)}")
    require_bools(agreement=agreement)


def _temperature(temperature: object) -> float:
    # Reading a tensor would synchronize with the device, and a captured CUDA graph would contain the value of the capture.
    if isinstance(temperature, bool) or not isinstance(temperature, Real):
        raise TypeError(f"temperature must be a float, not {shown(temperature)}")
    lowest, highest = TEMPERATURES
    if not lowest <= (number := float(temperature)) <= highest:
        raise ValueError(f"temperature must be > 0, from {lowest:g} to {highest:g}, not {temperature}")
    return number


def _scale(logits: Tensor, reduction: Reduction) -> float:
    """Return the factor of a reduction; NaN for the mean of an empty tensor, as in PyTorch."""
    count = {"mean": logits.numel(), "batchmean": len(logits), "sum": 1}[reduction]
    return 1.0 / count if count else math.nan


def _fake_scalar(logits: Tensor, dtype: torch.dtype, enabled: bool = True) -> Tensor:
    return logits.new_empty(() if enabled else 0, dtype=dtype)


def _fake_grad(logits: Tensor, dtype: torch.dtype, enabled: bool) -> Tensor:
    return torch.empty_like(logits, dtype=dtype) if enabled else logits.new_empty(0, dtype=dtype)


def _fake_l1(student: Tensor, teacher: Tensor, scale: float, requires_grad: bool, agreement: bool) -> tuple[Tensor, Tensor, Tensor]:
    sign = _fake_grad(student, torch.int8, requires_grad)
    return _fake_scalar(student, torch.float32), sign, _fake_scalar(student, torch.int64, agreement)


def _fake_divergence(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    scale: float,
    student_requires_grad: bool,
    teacher_requires_grad: bool,
    agreement: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads_unscaled = _fake_grad(student, student.dtype, student_requires_grad), _fake_grad(teacher, teacher.dtype, teacher_requires_grad)
    return _fake_scalar(student, torch.float32), *grads_unscaled, _fake_scalar(student, torch.int64, agreement)


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


def _fake_scale_gradients_(
    student_grad: Tensor, teacher_grad: Tensor, upstream: Tensor, student_scale: float, teacher_scale: float
) -> None:
    return None


operators.define(
    __name__,
    "l1_forward",
    "(Tensor student, Tensor teacher, float scale, bool requires_grad, bool agreement) -> (Tensor, Tensor, Tensor)",
    _fake_l1,
)
for _name in ("kl_forward", "js_forward"):
    operators.define(
        __name__,
        _name,
        "(Tensor student, Tensor teacher, float temperature, float scale, bool student_requires_grad, bool teacher_requires_grad,"
        " bool agreement) -> (Tensor, Tensor, Tensor, Tensor)",
        _fake_divergence,
    )
operators.define(
    __name__,
    "scale_gradients",
    "(Tensor student_grad_unscaled, Tensor teacher_grad_unscaled, Tensor upstream, float student_scale, float teacher_scale,"
    " ScalarType student_dtype, ScalarType teacher_dtype) -> (Tensor, Tensor)",
    _fake_scale_gradients,
)
operators.define(
    __name__,
    "scale_gradients_",
    "(Tensor(a!) student_grad, Tensor(b!) teacher_grad, Tensor upstream, float student_scale, float teacher_scale) -> ()",
    _fake_scale_gradients_,
)
