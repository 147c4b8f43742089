"""How far a student's logits are from its teacher's."""

from typing import Literal

from torch import Tensor

from . import reference

__all__ = ["Reduction", "kl_discrepancy", "l1_discrepancy"]

Reduction = Literal["batchmean", "mean", "sum"]


def l1_discrepancy(student: Tensor, teacher: Tensor, *, reduction: Reduction) -> Tensor:
    """Sum or mean of ``|student − teacher|`` over raw logits (DFAD, arXiv 1912.11006, eq. 1).

    Args:
        student, teacher: logits (N, C) or (N, C, H, W), of any floating dtype; read in float32.
        reduction: "mean" divides by every element, "batchmean" by N, "sum" by nothing.

    Returns:
        A 0-d tensor, float32 (float64 for float64 logits), differentiable on both sides.

    Raises:
        ValueError: shapes that differ or are no logits, or an unknown reduction.
    """
    _check(student, teacher, reduction)
    return reference.l1_discrepancy(student, teacher, reduction)


def kl_discrepancy(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float,
    reduction: Reduction,
    scale_by_temperature_squared: bool,
) -> Tensor:
    """KL(p_teacher ‖ p_student) of the softmax over classes at a temperature (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        student, teacher: logits (N, C) or (N, C, H, W), of any floating dtype; read in float32.
        temperature: both logits are divided by it, > 0.
        reduction: "batchmean" divides by N, "mean" by every element, "sum" by nothing.
        scale_by_temperature_squared: multiply by temperature², which keeps the size of the gradient as
            the temperature changes.

    Returns:
        A 0-d tensor in nats, float32 (float64 for float64 logits), differentiable on both sides.

    Raises:
        ValueError: shapes that differ or are no logits, a temperature ≤ 0, or an unknown reduction.
    """
    _check(student, teacher, reduction)
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, not {temperature}")
    return reference.kl_discrepancy(student, teacher, temperature, reduction, scale_by_temperature_squared)


def _check(student: Tensor, teacher: Tensor, reduction: str) -> None:
    if student.shape != teacher.shape:
        raise ValueError(f"student and teacher logits differ in shape: {tuple(student.shape)} and {tuple(teacher.shape)}")
    if student.ndim not in (2, 4):
        raise ValueError(f"logits must be (N, C) or (N, C, H, W), not {tuple(student.shape)}")
    if student.numel() == 0:
        raise ValueError(f"logits are empty: {tuple(student.shape)}")
    if reduction not in ("batchmean", "mean", "sum"):
        raise ValueError(f"reduction must be 'batchmean', 'mean' or 'sum', not {reduction!r}")
