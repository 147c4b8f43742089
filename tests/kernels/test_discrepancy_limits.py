"""Masked classes; equal, huge, nonfinite and empty logits."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_fast.kernels import Backend, use_backend
from tests.kernels.discrepancies import KINDS, PAIRS_OF_DTYPES, call, call_with_agreement, compare
from tests.kernels.oracles import INF, KERNEL_DTYPES, NAN, discrepancy, random, with_layout

pytestmark = pytest.mark.usefixtures("poisoned")


def over_possible_classes(kind: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The definition: KL, or both terms of JS, summed over classes with non-zero probability."""
    log_q, log_p = F.log_softmax(student / temperature, dim=1), F.log_softmax(teacher / temperature, dim=1)
    if kind == "kl":
        possible = log_p.exp() > 0
        return (log_p[possible].exp() * (log_p[possible] - log_q[possible])).sum()
    total = log_p.new_zeros(())
    for log, log_other in ((log_p, log_q), (log_q, log_p)):
        possible = log.exp() > 0
        log_m = ((log[possible].exp() + log_other[possible].exp()) / 2).log()
        total = total + 0.5 * (log[possible].exp() * (log[possible] - log_m)).sum()
    return total


def with_masked(logits: Tensor, masked: Tensor, layout: str = "contiguous") -> Tensor:
    return with_layout(logits.detach().masked_fill(masked.to(logits.device), -INF), layout).requires_grad_()


@pytest.mark.parametrize("shape", [(6, 10), (3, 100), (3, 9000), (3, 11, 5, 3), (3, 70, 3, 1)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("kind", "masks"),
    [*itertools.product(["kl", "js"], ["teacher", "both", "teacher more"]), ("js", "student"), ("js", "each another")],  # KL is infinite
)
def test_masked_classes_contribute_as_defined(
    backend: Backend, device: torch.device, kind: str, masks: str, layout: str, shape: tuple[int, ...]
) -> None:
    some, other = (torch.rand(shape) < 0.4 for _ in range(2))
    for mask in (some, other):  # also the last class alone, all but one, and a random half
        mask[0], mask[-1] = False, True
        mask[0, -1], mask[1:, 1] = True, False
    of_student = torch.zeros_like(some) if masks == "teacher" else some
    of_teacher = {"student": torch.zeros_like(some), "both": some, "teacher more": some | other}.get(masks, other)
    for dtype in KERNEL_DTYPES:
        student, teacher = (random(*shape, dtype=dtype, device=device) for _ in range(2))
        student, teacher = with_masked(student, of_student, layout), with_masked(teacher, of_teacher, layout)
        compare(kind, student, teacher, temperature=1.3, reduction="mean", formula=over_possible_classes)


@pytest.mark.parametrize("shape", [(3, 4), (3, 100), (2, 11, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_kl_is_infinite_with_a_finite_gradient_if_only_the_student_masks_a_class(
    backend: Backend, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    teacher, masked = random(*shape, dtype=dtype, device=device).detach(), torch.zeros(shape, dtype=torch.bool)
    masked[-1, 1] = True
    student = with_masked(random(*shape, dtype=dtype, device=device), masked)
    plain = student.detach().float().requires_grad_()
    expected = F.kl_div(plain.log_softmax(dim=1), teacher.float().softmax(dim=1), reduction="sum")
    loss = call("kl", student, teacher)
    assert loss.item() == expected.item() == INF
    (gradient,), (usual,) = torch.autograd.grad(loss, student), torch.autograd.grad(expected, plain)
    torch.testing.assert_close(gradient, usual.to(dtype))


@pytest.mark.parametrize("shape", [(3, 5), (3, 100), (3, 5, 2, 2)], ids=str)
@pytest.mark.parametrize("value", [NAN, INF, "a row of -inf"], ids=str)
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_logits_without_a_softmax_give_nan_as_in_pytorch(
    backend: Backend, device: torch.device, kind: str, side: int, value: float | str, shape: tuple[int, ...]
) -> None:
    sides = [random(*shape, device=device) for _ in range(2)]
    with torch.no_grad():
        sides[side][(1,) if isinstance(value, str) else (1, 2)] = -INF if isinstance(value, str) else value
    assert discrepancy(kind, sides[0], sides[1], 1.0).isnan()
    loss = call(kind, *sides)
    assert loss.isnan()
    for gradient in torch.autograd.grad(loss, sides):
        assert gradient[1].isnan().all()
        assert gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [(4, 2), (3, 100), (2, 10, 3, 3)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_huge_logits_are_as_accurate_as_plain_pytorch(
    backend: Backend, device: torch.device, kind: str, temperature: float, shape: tuple[int, ...]
) -> None:
    student, teacher = ((1e4 * random(*shape).detach().sign()).to(device).requires_grad_() for _ in range(2))
    compare(kind, student, teacher, temperature=temperature)
    student, teacher = (random(*shape, size=1e4, device=device) for _ in range(2))
    compare(kind, student, teacher, temperature=temperature)


@pytest.mark.parametrize("shape", [(4, 10), (3, 1000), (2, 11, 5, 3)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_logits_have_zero_loss_and_gradient(
    backend: Backend, device: torch.device, kind: str, dtype: torch.dtype, layout: str, shape: tuple[int, ...]
) -> None:
    student = random(*shape, dtype=dtype, size=20.0, device=device)
    teacher = with_layout(student.detach(), layout).detach().requires_grad_()
    loss = call(kind, student, teacher, temperature=3.0)
    # L1 and KL subtract equal numbers; log m = logaddexp(log p, log q) − log 2 is rounded, and so are the terms of the gradient.
    # Triton may add the exponentials of two sides with different strides in different orders.
    eps = torch.finfo(torch.float32).eps
    other_order = kind == "kl" and backend == "triton" and student.stride() != teacher.stride()
    assert abs(loss.item()) <= (student.numel() // shape[1] * eps if kind == "js" or other_order else 0.0)
    for gradient in torch.autograd.grad(loss, (student, teacher)):
        assert gradient.abs().max().item() <= (0.0 if kind == "l1" else (2 if other_order else 1) * eps)


@pytest.mark.parametrize(("shape", "dtype"), [((4, 5), torch.bfloat16), ((4, 100), torch.float32), ((4, 5, 2, 3), torch.float32)], ids=str)
@pytest.mark.parametrize("values", list(itertools.product([1.0, NAN, INF, -INF], repeat=2)), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_nonfinite_logits_propagate_as_in_the_reference(
    fused: Backend, device: torch.device, kind: str, values: tuple[float, float], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """In one row: at the same class, at different classes, and in all classes."""
    for indices in ([(1, 0), (1, 0)], [(1, 1), (1, 3)], [(1,), (1,)]):
        sides = [random(*shape, dtype=dtype, device=device) for _ in range(2)]
        with torch.no_grad():
            for side, value, index in zip(sides, values, indices, strict=True):
                if value != 1.0:
                    side[index] = value
        with use_backend("reference"):
            expected, expected_count = call_with_agreement(kind, *sides)
            expected_gradients = torch.autograd.grad(expected, sides)
        loss, count = call_with_agreement(kind, *sides)
        tolerance = 4 * max(torch.finfo(dtype).eps, 1e-6)
        torch.testing.assert_close(loss, expected, equal_nan=True, rtol=4e-6, atol=4e-6)
        assert count == expected_count
        for gradient, usual in zip(torch.autograd.grad(loss, sides), expected_gradients, strict=True):
            torch.testing.assert_close(gradient, usual, equal_nan=True, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(0, 5), (0, 100), (0, 5, 3, 2), (2, 5, 0, 3)], ids=str)
@pytest.mark.parametrize("dtypes", PAIRS_OF_DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_empty_logits_have_sum_0_and_mean_nan(
    backend: Backend, device: torch.device, kind: str, dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, ...]
) -> None:
    student, teacher = (random(*shape, dtype=dtype, device=device) for dtype in dtypes)
    loss, count = call_with_agreement(kind, student, teacher, reduction="sum")
    assert loss.item() == 0.0
    assert count is not None
    assert count.item() == 0
    for retain in (True, False):  # the last pass of float32 scales the saved gradients in place
        for gradient, side in zip(torch.autograd.grad(loss, (student, teacher), retain_graph=retain), (student, teacher), strict=True):
            assert (gradient.shape, gradient.dtype) == (shape, side.dtype)
    assert call(kind, student, teacher, reduction="mean").isnan()
    if shape[0] == 0:
        assert call(kind, student, teacher, reduction="batchmean").isnan()


@pytest.mark.parametrize(("size", "dtype"), [(1e4, torch.float32), (1e30, torch.float32), (1e30, torch.bfloat16), (6e4, torch.float16)])
def test_kl_of_huge_logits_is_finite(backend: Backend, device: torch.device, size: float, dtype: torch.dtype) -> None:
    student = torch.tensor([[size, -size, 0.0]], dtype=dtype, device=device, requires_grad=True)
    teacher = torch.tensor([[-size, size, 0.0]], dtype=dtype, device=device, requires_grad=True)
    loss = call("kl", student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(2 * size, rel=4e-3)
    assert student.grad is not None
    assert student.grad.tolist() == [[1.0, -1.0, 0.0]]
    assert teacher.grad is not None
    assert teacher.grad.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("temperature", [1e-4, 1e4])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_divergences_are_accurate_at_the_limits_of_the_temperature(
    fused: Backend, device: torch.device, kind: str, temperature: float
) -> None:
    student, teacher = (random(20, 100, device=device) for _ in range(2))
    exact = discrepancy(kind, student.double(), teacher.double(), temperature).item() * temperature**2
    assert call(kind, student, teacher, temperature=temperature, scaled=True).item() == pytest.approx(exact, rel=2e-3)
