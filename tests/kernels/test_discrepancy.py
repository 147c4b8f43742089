from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr
from torch import Tensor

from dfkd_fast.kernels import kl_discrepancy, l1_discrepancy
from dfkd_fast.kernels.discrepancy import Reduction

Array = np.ndarray[Any, np.dtype[np.float64]]
REDUCTIONS: list[Reduction] = ["batchmean", "mean", "sum"]
SHAPES = [(5, 7), (3, 11, 5, 2), (1, 2)]
LAYOUTS = ["contiguous", "transposed", "sliced"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def leaf(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    values = (2 * torch.randn(shape)).to(dtype)
    if layout == "transposed":
        values = values.transpose(1, -1).contiguous().transpose(1, -1)
    if layout == "sliced":
        values = torch.stack([values, values], dim=-1)[..., 0]
    return values.detach().requires_grad_()


def double(tensor: Tensor | None) -> Array:
    assert tensor is not None
    return tensor.detach().double().numpy()


def l1_closed_form(student: Array, teacher: Array) -> tuple[float, Array, Array]:
    sign = np.sign(student - teacher)
    return float(np.abs(student - teacher).sum()), sign, -sign


def kl_closed_form(student: Array, teacher: Array, temperature: float) -> tuple[float, Array, Array]:
    log_q, log_p = (log_softmax(logits / temperature, axis=1) for logits in (student, teacher))
    p, q = np.exp(log_p), np.exp(log_q)
    kl = rel_entr(p, q).sum(axis=1, keepdims=True)
    return float(kl.sum()), (q - p) / temperature, p * (log_p - log_q - kl) / temperature


def factor(reduction: Reduction, shape: tuple[int, ...]) -> float:
    return {"batchmean": 1 / shape[0], "mean": 1 / np.prod(shape), "sum": 1.0}[reduction]


def compare(loss: Tensor, student: Tensor, teacher: Tensor, oracle: tuple[float, Array, Array], scale: float) -> None:
    loss.backward()
    total, to_student, to_teacher = oracle
    assert loss.shape == ()
    # Half-precision logits are read in float32: the value is as exact as float32, the gradients are rounded once, at the end.
    assert loss.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    computed, stored = torch.finfo(loss.dtype), torch.finfo(student.dtype)
    np.testing.assert_allclose(loss.item(), scale * total, rtol=32 * computed.eps)
    absolute = 32 * computed.eps * scale + stored.smallest_normal * stored.eps
    for gradient, expected in ((student.grad, scale * to_student), (teacher.grad, scale * to_teacher)):
        np.testing.assert_allclose(double(gradient), expected, rtol=stored.eps, atol=absolute)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_l1_and_its_gradients_to_both_sides_are_the_closed_form(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, reduction: Reduction
) -> None:
    torch.manual_seed(0)
    student, teacher = leaf(shape, layout, dtype), leaf(shape, "contiguous", dtype)
    oracle = l1_closed_form(double(student), double(teacher))
    compare(l1_discrepancy(student, teacher, reduction=reduction), student, teacher, oracle, factor(reduction, shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_kl_and_its_gradients_to_both_sides_are_the_closed_form(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, reduction: Reduction
) -> None:
    torch.manual_seed(0)
    student, teacher = leaf(shape, "contiguous", dtype), leaf(shape, layout, dtype)
    oracle = kl_closed_form(double(student), double(teacher), 1.5)
    loss = kl_discrepancy(student, teacher, temperature=1.5, reduction=reduction, scale_by_temperature_squared=False)
    compare(loss, student, teacher, oracle, factor(reduction, shape))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("scaled", [False, True])
def test_kl_is_multiplied_by_temperature_squared_on_request(temperature: float, scaled: bool) -> None:
    torch.manual_seed(0)
    student, teacher = (leaf((5, 7), "contiguous", torch.float64) for _ in range(2))
    oracle = kl_closed_form(double(student), double(teacher), temperature)
    loss = kl_discrepancy(student, teacher, temperature=temperature, reduction="batchmean", scale_by_temperature_squared=scaled)
    compare(loss, student, teacher, oracle, (temperature**2 if scaled else 1.0) / 5)


def test_teacher_in_half_precision_is_read_in_float32() -> None:
    torch.manual_seed(0)
    student, teacher = leaf((5, 7), "contiguous", torch.float32), leaf((5, 7), "contiguous", torch.bfloat16)
    loss = l1_discrepancy(student, teacher, reduction="sum")
    assert loss.dtype == torch.float32
    np.testing.assert_allclose(loss.item(), l1_closed_form(double(student), double(teacher))[0], rtol=1e-6)


def test_l1_has_no_gradient_where_the_logits_agree() -> None:
    student = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    l1_discrepancy(student, torch.tensor([[1.0, 1.0, 4.0]]), reduction="sum").backward()
    assert student.grad is not None
    assert student.grad.tolist() == [[0.0, 1.0, -1.0]]


def test_kl_of_equal_logits_is_exactly_0() -> None:
    logits = 30 * torch.randn(16, 1000)
    assert kl_discrepancy(logits, logits, temperature=3.0, reduction="sum", scale_by_temperature_squared=True).item() == 0.0


@pytest.mark.parametrize(("size", "dtype"), [(1e4, torch.float32), (1e30, torch.float32), (1e30, torch.bfloat16), (6e4, torch.float16)])
def test_kl_of_huge_logits_is_finite(size: float, dtype: torch.dtype) -> None:
    student = torch.tensor([[size, -size, 0.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-size, size, 0.0]], dtype=dtype, requires_grad=True)
    loss = kl_discrepancy(student, teacher, temperature=1.0, reduction="sum", scale_by_temperature_squared=False)
    loss.backward()
    assert loss.item() == pytest.approx(2 * size, rel=4e-3)
    assert student.grad is not None
    assert student.grad.tolist() == [[1.0, -1.0, 0.0]]
    assert teacher.grad is not None
    assert teacher.grad.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((2, 3), (3, 2), r"differ in shape: \(2, 3\) and \(3, 2\)"),
        ((2, 3), (1, 3), "differ in shape"),
        ((3,), (3,), r"must be \(N, C\) or \(N, C, H, W\), not \(3,\)"),
        ((2, 3, 4), (2, 3, 4), r"must be \(N, C\)"),
        ((3, 0), (3, 0), r"no classes: \(3, 0\)"),
    ],
)
def test_what_is_no_pair_of_logits_is_refused(student: tuple[int, ...], teacher: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        l1_discrepancy(torch.zeros(student), torch.zeros(teacher), reduction="mean")
    with pytest.raises(ValueError, match=message):
        kl_discrepancy(torch.zeros(student), torch.zeros(teacher), temperature=1.0, reduction="mean", scale_by_temperature_squared=False)


def test_an_unknown_reduction_is_refused() -> None:
    logits = torch.zeros(2, 3)
    wrong: Any = "none"
    with pytest.raises(ValueError, match=r"reduction must be .* not 'none'"):
        l1_discrepancy(logits, logits, reduction=wrong)
    with pytest.raises(ValueError, match=r"reduction must be .* not 'none'"):
        kl_discrepancy(logits, logits, temperature=1.0, reduction=wrong, scale_by_temperature_squared=False)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        kl_discrepancy(logits, logits, temperature=temperature, reduction="sum", scale_by_temperature_squared=False)
