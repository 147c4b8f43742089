import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax, rel_entr, softmax
from torch import Tensor

from dfkd_fast.kernels import Backend, js_discrepancy, kl_discrepancy, l1_discrepancy, use_backend
from dfkd_fast.kernels.discrepancy import Reduction
from tests.kernels.oracles import (
    INF,
    LAYOUTS,
    NAN,
    PROPERTY,
    STORAGE,
    assert_as_exact_as_plain,
    discrepancy,
    laid_out,
    layouts,
    random,
    reduction_factor,
)

pytestmark = pytest.mark.usefixtures("poisoned")

Array = np.ndarray[Any, np.dtype[np.float64]]
FUNCTIONS: dict[str, Callable[..., Any]] = {"l1": l1_discrepancy, "kl": kl_discrepancy, "js": js_discrepancy}
KINDS = list(FUNCTIONS)
REDUCTIONS: list[Reduction] = ["batchmean", "mean", "sum"]
SHAPES = [
    *[(1, 1), (3, 1), (4, 2), (3, 100), (2, 365), (4, 1000)],
    *[(1, 1, 1, 1), (2, 1, 3, 5), (3, 11, 5, 2), (1, 365, 1, 3), (2, 1001, 1, 1)],
    *[(40, 1001), (700, 10)],  # several blocks and tiles, the last one incomplete
    # A thread of a CUDA kernel holds 1, 8, 16 or 32 classes of a row, or reads them again.
    *[pytest.param(shape, marks=pytest.mark.sanitize) for shape in ((5, 10), (3, 1001), (2, 11, 33, 31), (2, 21, 5, 3), (2, 100, 3, 1))],
]
PAIRS_OF_LAYOUTS = [
    ("channels_last", "channels_last"),
    ("contiguous", "channels_last"),
    ("channels_last", "sliced"),
    ("sliced", "transposed"),
    ("transposed", "expanded"),
    ("expanded", "misaligned"),
    ("misaligned", "contiguous"),
]
# Each costs numba some seconds for every kernel.
PAIRS_OF_DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float16),
]
WEIGHTS, COTANGENT = torch.tensor([0.5, -2.0, 3.0]), torch.tensor([1.0, 0.25, -0.5])


def call(
    kind: str, student: Tensor, teacher: Tensor, *, temperature: float = 1.0, reduction: Reduction = "sum", scaled: bool = False
) -> Tensor:
    return counted(kind, student, teacher, temperature=temperature, reduction=reduction, scaled=scaled)[0]


def counted(
    kind: str,
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    reduction: Reduction = "sum",
    scaled: bool = False,
    agreement: bool = True,
) -> tuple[Tensor, Tensor | None]:
    softened: dict[str, Any] = {} if kind == "l1" else {"temperature": temperature, "scale_by_temperature_squared": scaled}
    found = FUNCTIONS[kind](student, teacher, reduction=reduction, agreement=agreement, **softened)
    return found if agreement else (found, None)


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Through more than one number, so that the upstream gradient is not 1; twice, so that the first pass leaves the graph whole."""
    weighted = loss * WEIGHTS.to(loss)
    first = torch.autograd.grad(weighted, inputs, COTANGENT.to(loss), retain_graph=True)
    again = torch.autograd.grad(weighted, inputs, COTANGENT.to(loss))
    for gradient, other in zip(first, again, strict=True):  # the last pass may round the factor once more
        torch.testing.assert_close(gradient, other, rtol=2 * torch.finfo(gradient.dtype).eps, atol=torch.finfo(gradient.dtype).tiny)
    return again


def compare(
    kind: str,
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    reduction: Reduction = "sum",
    scaled: bool = False,
    formula: Callable[[str, Tensor, Tensor, float], Tensor] = discrepancy,
) -> None:
    """Value, both gradients and the agreement against float64."""
    loss, count = counted(kind, student, teacher, temperature=temperature, reduction=reduction, scaled=scaled)
    factor = reduction_factor(reduction, student.shape) * (temperature**2 if scaled and kind != "l1" else 1.0)
    exact_inputs = [side.detach().double().requires_grad_() for side in (student, teacher)]
    plain_inputs = [side.detach().clone().requires_grad_() for side in (student, teacher)]
    exact = factor * formula(kind, exact_inputs[0], exact_inputs[1], temperature)
    plain = factor * formula(kind, plain_inputs[0].float(), plain_inputs[1].float(), temperature)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    # A row's log p and log q are rounded at the size of the logarithm of C, their distances from log m at that of 2, and cancel.
    logarithms = student.numel() // student.shape[1] * factor if kind != "l1" else 0.0
    assert_as_exact_as_plain(loss.detach(), plain.detach(), exact.detach(), summed=logarithms)
    truth = gradients(exact, *exact_inputs)
    for side, gradient, usual, expected in zip(
        (student, teacher), gradients(loss, student, teacher), gradients(plain, *plain_inputs), truth, strict=True
    ):
        assert gradient.dtype == side.dtype
        assert_as_exact_as_plain(gradient, usual, expected, summed=factor if kind == "js" else 0.0)
    assert count is not None
    assert (count.shape, count.dtype) == ((), torch.int64)
    assert count.item() == (exact_inputs[0].argmax(dim=1) == exact_inputs[1].argmax(dim=1)).sum().item()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_value_gradients_and_agreement_are_those_of_float64(
    backend: Backend, device: torch.device, kind: str, shape: tuple[int, ...]
) -> None:
    student, teacher = (random(*shape, device=device) for _ in range(2))
    compare(kind, student, teacher, temperature=1.7, reduction=REDUCTIONS[sum(shape) % 3])


@pytest.mark.parametrize("shape", [(6, 7), (3, 100), (2, 11, 5, 3), (2, 70, 3, 1)], ids=str)
@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids="-".join)
@pytest.mark.parametrize("kind", KINDS)
def test_sides_may_lie_in_memory_as_they_like(
    backend: Backend, device: torch.device, kind: str, layouts: tuple[str, str], shape: tuple[int, ...]
) -> None:
    student, teacher = (random(*shape, layout=layout, device=device) for layout in layouts)
    compare(kind, student, teacher, temperature=0.6)


@pytest.mark.parametrize("layouts", [("contiguous", "contiguous"), ("channels_last", "sliced")], ids="-".join)
@pytest.mark.parametrize("shape", [(9, 100), (2, 10, 7, 3)], ids=str)
@pytest.mark.parametrize("dtypes", [*PAIRS_OF_DTYPES[:-1], pytest.param(PAIRS_OF_DTYPES[-1], marks=pytest.mark.sanitize)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_read_in_float32_on_either_side(
    backend: Backend,
    device: torch.device,
    kind: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    shape: tuple[int, ...],
    layouts: tuple[str, str],
) -> None:
    student, teacher = (random(*shape, dtype=dtype, layout=layout, device=device) for dtype, layout in zip(dtypes, layouts, strict=True))
    compare(kind, student, teacher, temperature=2.5, reduction="mean", scaled=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0, 1000.0])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_temperature_divides_and_its_square_multiplies_on_request(
    backend: Backend, device: torch.device, kind: str, temperature: float, scaled: bool, reduction: Reduction
) -> None:
    student, teacher = (random(5, 100, device=device) for _ in range(2))
    compare(kind, student, teacher, temperature=temperature, reduction=reduction, scaled=scaled)


@pytest.mark.parametrize("shape", [(20, 10), (4, 1000), (1, 9000), (2, 11, 3, 3)], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0, 1000.0])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_values_of_any_temperature_are_as_exact_as_plain_pytorch(
    backend: Backend, device: torch.device, kind: str, temperature: float, shape: tuple[int, ...]
) -> None:
    """Relative errors as the root mean square over draws: plain PyTorch may be exact by luck in one."""
    errors, usual = [], []
    for _ in range(6):
        student, teacher = (random(*shape, device=device).detach() for _ in range(2))
        exact = discrepancy(kind, student.double(), teacher.double(), temperature).item()
        plain = discrepancy(kind, student, teacher, temperature).item()
        errors.append(call(kind, student, teacher, temperature=temperature).item() / exact - 1)
        usual.append(plain / exact - 1)
    assert np.linalg.norm(errors) <= 2 * np.linalg.norm(usual) + 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("shape", [(3, 2), (2, 365), (1, 9000), (2, 11, 3, 3)], ids=str)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_little_divergences_do_not_cancel_in_a_kernel(fused: Backend, device: torch.device, kind: str, shape: tuple[int, ...]) -> None:
    """They are 1e-7 to 1e-6, and the rounded log-sum-exps that plain PyTorch subtracts are as far from the truth as 1e-7."""
    teacher = random(*shape, device=device).detach()
    nearby = teacher + 1e-3 * torch.randn(shape).to(device)
    for student, temperature in ((nearby, 1.0), (random(*shape, device=device).detach(), 1000.0)):
        exact = discrepancy(kind, student.double(), teacher.double(), temperature).item()
        assert call(kind, student, teacher, temperature=temperature).item() == pytest.approx(exact, rel=1e-3)


def of_possible_classes(kind: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The definition: the sum over rows of KL, or of both halves of JS, each over the classes to which its distribution gives mass."""
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
    return laid_out(logits.detach().masked_fill(masked.to(logits.device), -INF), layout).requires_grad_()


@pytest.mark.parametrize("shape", [(6, 10), (3, 100), (3, 9000), (3, 11, 5, 3), (3, 70, 3, 1)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("kind", "masks"),
    [*itertools.product(["kl", "js"], ["teacher", "both", "teacher more"]), ("js", "student"), ("js", "each another")],  # KL is infinite
)
def test_masked_classes_contribute_nothing_of_their_own(
    backend: Backend, device: torch.device, kind: str, masks: str, layout: str, shape: tuple[int, ...]
) -> None:
    some, other = (torch.rand(shape) < 0.4 for _ in range(2))
    for mask in (some, other):  # also the last class alone, all but one, and a random half
        mask[0], mask[-1] = False, True
        mask[0, -1], mask[1:, 1] = True, False
    of_student = torch.zeros_like(some) if masks == "teacher" else some
    of_teacher = {"student": torch.zeros_like(some), "both": some, "teacher more": some | other}.get(masks, other)
    for dtype in STORAGE:
        student, teacher = (random(*shape, dtype=dtype, device=device) for _ in range(2))
        student, teacher = with_masked(student, of_student, layout), with_masked(teacher, of_teacher, layout)
        compare(kind, student, teacher, temperature=1.3, reduction="mean", formula=of_possible_classes)


@pytest.mark.parametrize("shape", [(3, 4), (3, 100), (2, 11, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_kl_is_infinite_where_the_student_alone_masks_a_class_and_its_gradient_is_finite(
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
def test_logits_without_a_softmax_make_their_row_nan_as_in_pytorch(
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
def test_huge_logits_are_as_exact_as_plain_pytorch(
    backend: Backend, device: torch.device, kind: str, temperature: float, shape: tuple[int, ...]
) -> None:
    student, teacher = ((1e4 * random(*shape).detach().sign()).to(device).requires_grad_() for _ in range(2))
    compare(kind, student, teacher, temperature=temperature)
    student, teacher = (random(*shape, size=1e4, device=device) for _ in range(2))
    compare(kind, student, teacher, temperature=temperature)


@pytest.mark.parametrize("shape", [(4, 10), (3, 1000), (2, 11, 5, 3)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_logits_have_neither_discrepancy_nor_gradient(
    backend: Backend, device: torch.device, kind: str, dtype: torch.dtype, layout: str, shape: tuple[int, ...]
) -> None:
    student = random(*shape, dtype=dtype, size=20.0, device=device)
    teacher = laid_out(student.detach(), layout).detach().requires_grad_()
    loss = call(kind, student, teacher, temperature=3.0)
    # L1 and KL subtract equal numbers; log m = logaddexp(log p, log q) − log 2 is rounded, and so is what makes up a gradient.
    # Triton may add the exponentials of two sides that lie differently in memory in different orders.
    eps = torch.finfo(torch.float32).eps
    other_order = kind == "kl" and backend == "triton" and student.stride() != teacher.stride()
    assert abs(loss.item()) <= (student.numel() // shape[1] * eps if kind == "js" or other_order else 0.0)
    for gradient in torch.autograd.grad(loss, (student, teacher)):
        assert gradient.abs().max().item() <= (0.0 if kind == "l1" else (2 if other_order else 1) * eps)


@pytest.mark.parametrize(("shape", "dtype"), [((4, 5), torch.bfloat16), ((4, 100), torch.float32), ((4, 5, 2, 3), torch.float32)], ids=str)
@pytest.mark.parametrize("values", list(itertools.product([1.0, NAN, INF, -INF], repeat=2)), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_goes_where_it_goes_in_the_reference(
    fused: Backend, device: torch.device, kind: str, values: tuple[float, float], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """In the second of four rows, at the same class and at different ones, and as a whole row."""
    for places in ([(1, 0), (1, 0)], [(1, 1), (1, 3)], [(1,), (1,)]):
        sides = [random(*shape, dtype=dtype, device=device) for _ in range(2)]
        with torch.no_grad():
            for side, value, place in zip(sides, values, places, strict=True):
                if value != 1.0:
                    side[place] = value
        with use_backend("reference"):
            expected, expected_count = counted(kind, *sides)
            expected_gradients = torch.autograd.grad(expected, sides)
        loss, count = counted(kind, *sides)
        tolerance = 4 * max(torch.finfo(dtype).eps, 1e-6)
        torch.testing.assert_close(loss, expected, equal_nan=True, rtol=4e-6, atol=4e-6)
        assert count == expected_count
        for gradient, usual in zip(torch.autograd.grad(loss, sides), expected_gradients, strict=True):
            torch.testing.assert_close(gradient, usual, equal_nan=True, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(0, 5), (0, 100), (0, 5, 3, 2), (2, 5, 0, 3)], ids=str)
@pytest.mark.parametrize("dtypes", PAIRS_OF_DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_of_no_rows_the_sum_is_0_and_the_mean_is_nan(
    backend: Backend, device: torch.device, kind: str, dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, ...]
) -> None:
    student, teacher = (random(*shape, dtype=dtype, device=device) for dtype in dtypes)
    loss, count = counted(kind, student, teacher, reduction="sum")
    assert loss.item() == 0.0
    assert count is not None
    assert count.item() == 0
    for retain in (True, False):  # the last pass of float32 scales what was saved in place
        for gradient, side in zip(torch.autograd.grad(loss, (student, teacher), retain_graph=retain), (student, teacher), strict=True):
            assert (gradient.shape, gradient.dtype) == (shape, side.dtype)
    assert call(kind, student, teacher, reduction="mean").isnan()
    if shape[0] == 0:
        assert call(kind, student, teacher, reduction="batchmean").isnan()


@PROPERTY
@given(data=st.data(), kind=st.sampled_from(KINDS), dtypes=st.sampled_from(PAIRS_OF_DTYPES), temperature=st.floats(0.25, 8))
def test_any_shape_and_strides(
    fused: Backend, device: torch.device, data: st.DataObject, kind: str, dtypes: tuple[torch.dtype, torch.dtype], temperature: float
) -> None:
    classes = data.draw(st.one_of(st.integers(1, 20), st.integers(60, 70), st.integers(1, 1100)))
    pixels = data.draw(st.one_of(st.just(()), st.tuples(st.integers(1, 6), st.integers(1, 6))))
    shape = (data.draw(st.integers(1, 5)), classes, *pixels)
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    student, teacher = (
        data.draw(layouts(len(shape)))(2 * torch.randn(shape).to(device, dtype)).detach().requires_grad_() for dtype in dtypes
    )
    reduction = data.draw(st.sampled_from(REDUCTIONS))
    compare(kind, student, teacher, temperature=temperature, reduction=reduction, scaled=data.draw(st.booleans()))


def first_largest(logits: list[float]) -> int:
    """The definition, in Python: the first NaN, or else the first maximum."""
    nans = [index for index, logit in enumerate(logits) if logit != logit]
    return nans[0] if nans else logits.index(max(logits))


@pytest.mark.parametrize("shape", [(400, 1), (400, 5), (300, 70), (20, 5, 7, 3)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtypes", PAIRS_OF_DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_agreement_counts_equal_first_maxima_with_nan_above_everything(
    backend: Backend, device: torch.device, kind: str, dtypes: tuple[torch.dtype, torch.dtype], layout: str, shape: tuple[int, ...]
) -> None:
    values = torch.tensor([-INF, -1.0, 0.0, 0.5, 0.5, INF, NAN])
    chances = torch.tensor([2.0, 2.0, 2.0, 2.0, 2.0, 0.5, 0.3])
    sides = []
    for dtype in dtypes:
        drawn = values[chances.multinomial(int(np.prod(shape)), replacement=True)].view(shape)
        sides.append(laid_out(drawn.to(device, dtype), layout).requires_grad_())
    rows = [side.double().movedim(1, -1).flatten(0, -2).tolist() for side in sides]
    expected = sum(first_largest(s) == first_largest(t) for s, t in zip(*rows, strict=True))
    assert counted(kind, *sides)[1] == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 100), (2, 5, 3, 3)], ids=str)
@pytest.mark.parametrize("agreement", [False, True])
def test_only_a_side_that_asks_gets_a_gradient_and_the_other_changes_nothing(
    backend: Backend, device: torch.device, kind: str, shape: tuple[int, ...], agreement: bool
) -> None:
    student, teacher = (random(*shape, device=device) for _ in range(2))
    both_loss, _ = counted(kind, student, teacher, temperature=2.0, agreement=agreement)
    both = torch.autograd.grad(both_loss, (student, teacher))
    for index in range(2):
        sides = [side.detach() for side in (student, teacher)]
        sides[index].requires_grad_()
        loss, _ = counted(kind, *sides, temperature=2.0, agreement=agreement)
        (gradient,) = torch.autograd.grad(loss, sides[index])
        assert torch.equal(loss, both_loss)
        assert torch.equal(gradient, both[index])
    assert not call(kind, student.detach(), teacher.detach()).requires_grad
    with torch.no_grad():
        assert not call(kind, student, teacher).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_a_student_compared_with_itself(backend: Backend, device: torch.device, kind: str) -> None:
    logits = random(4, 100, device=device)
    (gradient,) = torch.autograd.grad(call(kind, logits, 0.5 * logits, temperature=2.0), logits)
    twin = logits.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(discrepancy(kind, twin, 0.5 * twin, 2.0), twin)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 70), (3, 5, 4, 2)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_lies_as_its_logits_do_without_gaps(
    fused: Backend, device: torch.device, kind: str, shape: tuple[int, ...], layout: str
) -> None:
    student, teacher = random(*shape, layout=layout, device=device), random(*shape, device=device)
    for sides in ((student, teacher), (teacher, student)):
        gradients = torch.autograd.grad(call(kind, *sides), sides)
        assert gradients[0].stride() == torch.empty_like(sides[0]).stride()
        # L1 keeps one tensor of signs for both sides, laid out as the student.
        assert gradients[1].stride() == torch.empty_like(sides[kind != "l1"]).stride()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2, 2)], ids=str)
def test_the_reference_has_first_and_second_derivatives(kind: str, shape: tuple[int, ...]) -> None:
    sides = tuple(random(*shape, dtype=torch.float64) for _ in range(2))

    def function(student: Tensor, teacher: Tensor) -> Tensor:
        return call(kind, student, teacher, temperature=1.5, reduction="mean", scaled=True)

    assert torch.autograd.gradcheck(function, sides)
    assert torch.autograd.gradgradcheck(function, sides)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_derivative_of_a_kernel_is_refused(fused: Backend, device: torch.device, kind: str) -> None:
    """As soon as a graph of the first is asked for: where the upstream gradient has none, the second would be wrong in silence."""
    student, teacher = (random(3, 100, device=device) for _ in range(2))
    weight = torch.ones((), device=device, requires_grad=True)
    for loss in (call(kind, student, teacher).square(), call(kind, weight * student, teacher)):
        with pytest.raises(RuntimeError, match=r'use_backend\("reference"\)'):
            torch.autograd.grad(loss, (student, teacher), create_graph=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_dropped_further_on_has_no_gradient(backend: Backend, device: torch.device, kind: str) -> None:
    class Dropped(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(_: Any, __: Tensor) -> None:
            return None

    student, teacher = (random(3, 100, device=device) for _ in range(2))
    Dropped.apply(call(kind, student, teacher)).backward()
    assert student.grad is None or not student.grad.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(300, 101), (3, 11, 65, 63)], ids=str)
def test_bits_depend_neither_on_the_run_nor_on_the_number_of_threads(
    fused: Backend, device: torch.device, kind: str, shape: tuple[int, ...]
) -> None:
    student, teacher = (random(*shape, device=device) for _ in range(2))
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        loss = call(kind, student, teacher, temperature=1.5)
        results.append((loss, *torch.autograd.grad(loss, (student, teacher))))
    for again in results[1:]:
        assert all(map(torch.equal, results[0], again))


def double(tensor: Tensor) -> Array:
    return tensor.detach().double().cpu().numpy()


def kl_closed_form(student: Array, teacher: Array, temperature: float) -> tuple[float, Array, Array]:
    log_q, log_p = (log_softmax(logits / temperature, axis=1) for logits in (student, teacher))
    p, q = np.exp(log_p), np.exp(log_q)
    kl = rel_entr(p, q).sum(axis=1, keepdims=True)
    return float(kl.sum()), (q - p) / temperature, p * (log_p - log_q - kl) / temperature


def js_closed_form(student: Array, teacher: Array, temperature: float) -> tuple[float, Array, Array]:
    q, p = (softmax(logits / temperature, axis=1) for logits in (student, teacher))
    m = (p + q) / 2

    def side(x: Array) -> Array:
        return 0.5 * x * (np.log(x / m) - rel_entr(x, m).sum(axis=1, keepdims=True)) / temperature

    return float((jensenshannon(p, q, axis=1) ** 2).sum()), side(q), side(p)


@pytest.mark.parametrize("closed_form", [kl_closed_form, js_closed_form])
@pytest.mark.parametrize("shape", [(5, 7), (5, 70), (3, 11, 5, 2)], ids=str)
def test_divergences_are_those_of_scipy_with_gradients_in_closed_form(
    backend: Backend, device: torch.device, closed_form: Callable[..., tuple[float, Array, Array]], shape: tuple[int, ...]
) -> None:
    student, teacher = (random(*shape, device=device) for _ in range(2))
    loss = call("kl" if closed_form is kl_closed_form else "js", student, teacher, temperature=1.5)
    total, *closed = closed_form(double(student), double(teacher), 1.5)
    np.testing.assert_allclose(loss.item(), total, rtol=1e-6)
    for gradient, expected in zip(torch.autograd.grad(loss, (student, teacher)), closed, strict=True):
        np.testing.assert_allclose(double(gradient), expected, rtol=1e-5, atol=1e-7)


def test_l1_has_no_gradient_where_the_logits_agree(backend: Backend, device: torch.device) -> None:
    student = torch.tensor([[1.0, 2.0, 3.0]], device=device, requires_grad=True)
    l1_discrepancy(student, torch.tensor([[1.0, 1.0, 4.0]], device=device), reduction="sum").backward()
    assert student.grad is not None
    assert student.grad.tolist() == [[0.0, 1.0, -1.0]]


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


@pytest.mark.parametrize("kind", KINDS)
def test_float64_logits_are_computed_in_float64(kind: str) -> None:
    student, teacher = (random(3, 4000, dtype=torch.float64) for _ in range(2))
    loss = call(kind, student, teacher)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, discrepancy(kind, student, teacher, 1.0), rtol=1e-12, atol=0)
    mixed = call(kind, student, teacher.float())
    assert mixed.dtype == torch.float64
    torch.testing.assert_close(mixed, discrepancy(kind, student, teacher.float().double(), 1.0), rtol=1e-6, atol=0)


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
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_pair_of_logits_is_refused(kind: str, student: tuple[int, ...], teacher: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(kind, torch.zeros(student), torch.zeros(teacher))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_on_two_devices_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="differ in device: cpu and meta"):
        call(kind, torch.zeros(2, 3), torch.zeros(2, 3, device="meta"))


@pytest.mark.parametrize("wrong", ["none", None, ["sum"], 1, torch.ones(2)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_reduction_is_refused(kind: str, wrong: Any) -> None:
    with pytest.raises(ValueError, match="reduction must be 'batchmean', 'mean' or 'sum', not "):
        call(kind, torch.zeros(2, 3), torch.zeros(2, 3), reduction=wrong)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_a_dtype_that_is_not_floating_are_refused(backend: Backend, kind: str, side: str, dtype: torch.dtype) -> None:
    sides: dict[str, Any] = {"student": torch.zeros(2, 3), "teacher": torch.zeros(2, 3)} | {side: torch.zeros(2, 3, dtype=dtype)}
    with pytest.raises(ValueError, match=f"{side} logits must have a floating-point dtype, not {dtype}"):
        call(kind, **sides)


@pytest.mark.parametrize("wrong", [[[0.0, 1.0, 2.0]], None, 1.0], ids=["list", "None", "float"])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_that_are_no_dense_tensors_are_refused(kind: str, side: str, wrong: Any) -> None:
    sides: dict[str, Any] = {"student": torch.zeros(1, 3), "teacher": torch.zeros(1, 3)}
    with pytest.raises(TypeError, match=f"{side} must be a tensor of logits, not a {type(wrong).__name__}"):
        call(kind, **sides | {side: wrong})
    with pytest.raises(ValueError, match=f"{side} logits must be dense, not torch.sparse_coo"):
        call(kind, **sides | {side: torch.zeros(1, 3).to_sparse()})


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN, INF, -INF, 1e20, 1e5, 1e-5])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_temperature_out_of_range_is_refused(backend: Backend, device: torch.device, kind: str, temperature: float) -> None:
    with pytest.raises(ValueError, match=r"temperature must be > 0, from 0\.0001 to 10000, not "):
        call(kind, torch.zeros(2, 3, device=device), torch.zeros(2, 3, device=device), temperature=temperature)


@pytest.mark.parametrize("temperature", [True, None, "1", 1j, torch.tensor(2.0), torch.ones(2)], ids=str)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_temperature_that_is_no_number_is_refused(backend: Backend, device: torch.device, kind: str, temperature: Any) -> None:
    with pytest.raises(TypeError, match="temperature must be a float, not "):
        call(kind, torch.zeros(2, 3, device=device), torch.zeros(2, 3, device=device), temperature=temperature)


@pytest.mark.parametrize("temperature", [2, np.float32(2), np.int64(2)], ids=lambda number: type(number).__name__)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_temperature_may_be_any_real_number(backend: Backend, device: torch.device, kind: str, temperature: Any) -> None:
    student, teacher = (random(2, 3, device=device) for _ in range(2))
    results = [call(kind, student, teacher, temperature=number, scaled=True) for number in (temperature, 2.0)]
    assert torch.equal(*results)


@pytest.mark.parametrize("temperature", [1e-4, 1e4])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_divergences_are_right_at_the_ends_of_the_temperatures(fused: Backend, device: torch.device, kind: str, temperature: float) -> None:
    student, teacher = (random(20, 100, device=device) for _ in range(2))
    exact = discrepancy(kind, student.double(), teacher.double(), temperature).item() * temperature**2
    assert call(kind, student, teacher, temperature=temperature, scaled=True).item() == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize("wrong", [1, "no", None, torch.tensor(True)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_switch_that_is_not_a_bool_is_refused(kind: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match="agreement must be True or False, not "):
        counted(kind, torch.zeros(2, 3), torch.zeros(2, 3), agreement=wrong)
    if kind != "l1":
        with pytest.raises(TypeError, match="scale_by_temperature_squared must be True or False, not "):
            call(kind, torch.zeros(2, 3), torch.zeros(2, 3), scaled=wrong)
