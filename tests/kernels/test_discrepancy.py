"""Loss, gradients and agreement compared with float64, for all shapes, layouts and dtypes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax, rel_entr, softmax
from torch import Tensor

from dfkd_fast.kernels import Backend, l1_discrepancy
from dfkd_fast.kernels.discrepancy import Reduction
from tests.kernels.discrepancies import KINDS, PAIRS_OF_DTYPES, REDUCTIONS, call, call_with_agreement, compare
from tests.kernels.oracles import INF, LAYOUTS, NAN, PROPERTY, discrepancy, layouts, random, with_layout

pytestmark = pytest.mark.usefixtures("poisoned")

Array = np.ndarray[Any, np.dtype[np.float64]]
SHAPES = [
    *[(1, 1), (3, 1), (4, 2), (3, 100), (2, 365), (4, 1000)],
    *[(1, 1, 1, 1), (2, 1, 3, 5), (3, 11, 5, 2), (1, 365, 1, 3), (2, 1001, 1, 1)],
    *[(40, 1001), (700, 10)],  # several blocks and tiles, the last one incomplete
    # A CUDA thread holds 1, 8, 16 or 32 classes of a row in registers, or streams them.
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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_gradients_and_agreement_match_float64(backend: Backend, device: torch.device, kind: str, shape: tuple[int, ...]) -> None:
    student, teacher = (random(*shape, device=device) for _ in range(2))
    compare(kind, student, teacher, temperature=1.7, reduction=REDUCTIONS[sum(shape) % 3])


@pytest.mark.parametrize("shape", [(6, 7), (3, 100), (2, 11, 5, 3), (2, 70, 3, 1)], ids=str)
@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids="-".join)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_may_have_any_layout(
    backend: Backend, device: torch.device, kind: str, layouts: tuple[str, str], shape: tuple[int, ...]
) -> None:
    student, teacher = (random(*shape, layout=layout, device=device) for layout in layouts)
    compare(kind, student, teacher, temperature=0.6)


@pytest.mark.parametrize("layouts", [("contiguous", "contiguous"), ("channels_last", "sliced")], ids="-".join)
@pytest.mark.parametrize("shape", [(9, 100), (2, 10, 7, 3)], ids=str)
@pytest.mark.parametrize("dtypes", [*PAIRS_OF_DTYPES[:-1], pytest.param(PAIRS_OF_DTYPES[-1], marks=pytest.mark.sanitize)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_logits_are_computed_in_float32(
    backend: Backend,
    device: torch.device,
    kind: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    shape: tuple[int, ...],
    layouts: tuple[str, str],
) -> None:
    student, teacher = (random(*shape, dtype=dtype, layout=layout, device=device) for dtype, layout in zip(dtypes, layouts, strict=True))
    compare(kind, student, teacher, temperature=2.5, reduction="mean", scaled=True)


# CUDA threads read rows of up to 32 classes through shared memory, in tiles of 256 rows or 128; the last one is incomplete.
@pytest.mark.parametrize("classes", [1, 2, 8, 10, 11, 16, 19, 21, 24, 32, 33])
@pytest.mark.parametrize("kind", KINDS)
def test_dense_rows_of_few_classes(backend: Backend, device: torch.device, kind: str, classes: int) -> None:
    last, planes = "channels_last", "contiguous"
    for pair, pixels, dtypes in (
        ((last, last), (17, 23), PAIRS_OF_DTYPES[0]),
        ((last, last), (17, 23), PAIRS_OF_DTYPES[1]),
        ((planes, planes), (13, 24), PAIRS_OF_DTYPES[1]),
        ((planes, last), (20, 28), PAIRS_OF_DTYPES[2]),
    ):
        sides = [random(2, classes, *pixels, dtype=dtype, layout=each, device=device) for dtype, each in zip(dtypes, pair, strict=True)]
        compare(kind, *sides, temperature=1.7)


# Without agreement, L1 of two tensors with the same strides does not depend on the rows.
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "misaligned", "sliced"])
@pytest.mark.parametrize("dtypes", PAIRS_OF_DTYPES[1:3], ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (5, 11, 17, 23)], ids=str)
def test_l1_without_agreement(
    backend: Backend, device: torch.device, dtypes: tuple[torch.dtype, torch.dtype], layout: str, shape: tuple[int, ...]
) -> None:
    student, teacher = (random(*shape, dtype=dtype, layout=layout, device=device) for dtype in dtypes)
    loss, _ = call_with_agreement("l1", student, teacher, agreement=False)
    difference = student.detach().double() - teacher.detach().double()
    torch.testing.assert_close(loss.double(), difference.abs().sum(), rtol=1e-6, atol=0)
    for gradient, sign in zip(torch.autograd.grad(3 * loss, (student, teacher)), (1, -1), strict=True):
        assert torch.equal(gradient, (3 * sign * difference.sign()).to(gradient.dtype))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0, 1000.0])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_temperature_and_its_square_are_applied(
    backend: Backend, device: torch.device, kind: str, temperature: float, scaled: bool, reduction: Reduction
) -> None:
    student, teacher = (random(5, 100, device=device) for _ in range(2))
    compare(kind, student, teacher, temperature=temperature, reduction=reduction, scaled=scaled)


@pytest.mark.parametrize("shape", [(20, 10), (4, 1000), (1, 9000), (2, 11, 3, 3)], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0, 1000.0])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_losses_at_any_temperature_are_as_accurate_as_plain_pytorch(
    backend: Backend, device: torch.device, kind: str, temperature: float, shape: tuple[int, ...]
) -> None:
    """Root-mean-square relative errors over several draws, because plain PyTorch can be exact by chance in one."""
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
def test_small_divergences_do_not_cancel(fused: Backend, device: torch.device, kind: str, shape: tuple[int, ...]) -> None:
    """Divergences of 1e-7 to 1e-6, the size of the rounding errors of the log-sum-exps that plain PyTorch subtracts."""
    teacher = random(*shape, device=device).detach()
    nearby = teacher + 1e-3 * torch.randn(shape).to(device)
    for student, temperature in ((nearby, 1.0), (random(*shape, device=device).detach(), 1000.0)):
        exact = discrepancy(kind, student.double(), teacher.double(), temperature).item()
        assert call(kind, student, teacher, temperature=temperature).item() == pytest.approx(exact, rel=1e-3)


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
    """The definition of argmax: the first NaN, else the first maximum."""
    nans = [index for index, logit in enumerate(logits) if logit != logit]
    return nans[0] if nans else logits.index(max(logits))


@pytest.mark.parametrize("shape", [(400, 1), (400, 5), (300, 70), (20, 5, 7, 3)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtypes", PAIRS_OF_DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_agreement_counts_equal_argmaxes_with_nan_as_maximum(
    backend: Backend, device: torch.device, kind: str, dtypes: tuple[torch.dtype, torch.dtype], layout: str, shape: tuple[int, ...]
) -> None:
    values = torch.tensor([-INF, -1.0, 0.0, 0.5, 0.5, INF, NAN])
    chances = torch.tensor([2.0, 2.0, 2.0, 2.0, 2.0, 0.5, 0.3])
    sides = []
    for dtype in dtypes:
        drawn = values[chances.multinomial(int(np.prod(shape)), replacement=True)].view(shape)
        sides.append(with_layout(drawn.to(device, dtype), layout).requires_grad_())
    rows = [side.double().movedim(1, -1).flatten(0, -2).tolist() for side in sides]
    expected = sum(first_largest(s) == first_largest(t) for s, t in zip(*rows, strict=True))
    assert call_with_agreement(kind, *sides)[1] == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 100), (2, 5, 3, 3)], ids=str)
@pytest.mark.parametrize("agreement", [False, True])
def test_gradients_do_not_depend_on_which_side_requires_grad(
    backend: Backend, device: torch.device, kind: str, shape: tuple[int, ...], agreement: bool
) -> None:
    student, teacher = (random(*shape, device=device) for _ in range(2))
    both_loss, _ = call_with_agreement(kind, student, teacher, temperature=2.0, agreement=agreement)
    both = torch.autograd.grad(both_loss, (student, teacher))
    for index in range(2):
        sides = [side.detach() for side in (student, teacher)]
        sides[index].requires_grad_()
        loss, _ = call_with_agreement(kind, *sides, temperature=2.0, agreement=agreement)
        (gradient,) = torch.autograd.grad(loss, sides[index])
        assert torch.equal(loss, both_loss)
        assert torch.equal(gradient, both[index])
    assert not call(kind, student.detach(), teacher.detach()).requires_grad
    with torch.no_grad():
        assert not call(kind, student, teacher).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_student_and_teacher_may_depend_on_the_same_leaf(backend: Backend, device: torch.device, kind: str) -> None:
    logits = random(4, 100, device=device)
    (gradient,) = torch.autograd.grad(call(kind, logits, 0.5 * logits, temperature=2.0), logits)
    twin = logits.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(discrepancy(kind, twin, 0.5 * twin, 2.0), twin)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 70), (3, 5, 4, 2)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_has_the_strides_of_empty_like_its_logits(
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
def test_double_backward_through_a_kernel_raises(fused: Backend, device: torch.device, kind: str) -> None:
    """``create_graph=True`` raises: without a graph of the upstream gradient, the second derivative would be silently wrong."""
    student, teacher = (random(3, 100, device=device) for _ in range(2))
    weight = torch.ones((), device=device, requires_grad=True)
    for loss in (call(kind, student, teacher).square(), call(kind, weight * student, teacher)):
        with pytest.raises(RuntimeError, match=r'use_backend\("reference"\)'):
            torch.autograd.grad(loss, (student, teacher), create_graph=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_without_upstream_gradient_has_no_gradient(backend: Backend, device: torch.device, kind: str) -> None:
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


@pytest.mark.parallel
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(300, 101), (3, 11, 65, 63)], ids=str)
def test_results_are_bitwise_reproducible_for_any_number_of_threads(
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
def test_divergences_match_scipy_and_closed_form_gradients(
    backend: Backend, device: torch.device, closed_form: Callable[..., tuple[float, Array, Array]], shape: tuple[int, ...]
) -> None:
    student, teacher = (random(*shape, device=device) for _ in range(2))
    loss = call("kl" if closed_form is kl_closed_form else "js", student, teacher, temperature=1.5)
    total, *closed = closed_form(double(student), double(teacher), 1.5)
    np.testing.assert_allclose(loss.item(), total, rtol=1e-6)
    for gradient, expected in zip(torch.autograd.grad(loss, (student, teacher)), closed, strict=True):
        np.testing.assert_allclose(double(gradient), expected, rtol=1e-5, atol=1e-7)


def test_l1_gradient_is_0_for_equal_logits(backend: Backend, device: torch.device) -> None:
    student = torch.tensor([[1.0, 2.0, 3.0]], device=device, requires_grad=True)
    l1_discrepancy(student, torch.tensor([[1.0, 1.0, 4.0]], device=device), reduction="sum").backward()
    assert student.grad is not None
    assert student.grad.tolist() == [[0.0, 1.0, -1.0]]


@pytest.mark.parametrize("kind", KINDS)
def test_float64_logits_are_computed_in_float64(kind: str) -> None:
    student, teacher = (random(3, 4000, dtype=torch.float64) for _ in range(2))
    loss = call(kind, student, teacher)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, discrepancy(kind, student, teacher, 1.0), rtol=1e-12, atol=0)
    mixed = call(kind, student, teacher.float())
    assert mixed.dtype == torch.float64
    torch.testing.assert_close(mixed, discrepancy(kind, student, teacher.float().double(), 1.0), rtol=1e-6, atol=0)
