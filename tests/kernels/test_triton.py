"""The Triton kernels against float64, on a GPU; test_triton_interpreted.py runs the same tests without one."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dfkd_fast.kernels.concat import gpu as concat
from dfkd_fast.kernels.discrepancy import gpu as discrepancy
from dfkd_fast.kernels.dispatch import interpreting
from dfkd_fast.kernels.ema import gpu as ema
from dfkd_fast.kernels.moments import gpu as moments
from dfkd_fast.kernels.tiles import launch

DEVICE = "cpu" if interpreting() else "cuda"
pytestmark: list[pytest.MarkDecorator] = [] if interpreting() else [pytest.mark.gpu]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "channels_last", "sliced", "transposed", "expanded"]
ACTIVATIONS = ["none", "tanh", "tanh"]  # per dtype; test_concat.py tests every activation in float32
EPS = torch.finfo(torch.float32).eps
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Fill uninitialized memory with NaN or the largest integer."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Tensor:
    values = (2 * torch.randn(shape)).to(DEVICE, dtype)
    match layout:
        case "channels_last":
            return values.movedim(1, -1).contiguous().movedim(-1, 1)
        case "sliced":
            return torch.stack([values, values], dim=-1)[..., 0]
        case "transposed":
            return values.transpose(0, -1).contiguous().transpose(0, -1)
        case "expanded":
            return values[:1].expand(shape)
    return values


def assert_accurate(actual: Tensor, oracle: Tensor, plain: Tensor, *, slack: float = 16, terms: float = 0) -> None:
    """Assert an error of at most twice that of PyTorch in float32, plus ``slack`` float32 ulps of the largest result and one of
    ``terms``, the magnitude of the summed terms."""
    assert actual.shape == oracle.shape
    actual, oracle, plain = actual.double(), oracle.double(), plain.to(actual.dtype).double()
    assert torch.equal(actual.isnan(), plain.isnan())
    assert torch.equal(actual[plain.isinf()], plain[plain.isinf()])
    finite = plain.isfinite()
    if finite.any():
        actual, plain, oracle = actual[finite], plain[finite], oracle[finite]
        allowed = 2 * (plain - oracle).abs().max() + EPS * (slack * oracle.abs().max() + terms)
        assert (actual - oracle).abs().max() <= allowed


# ------------------------------------------------------------------------------------------------ discrepancy


def losses(kind: str, student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over rows and the gradients of both sides, by the definitions, in the precision of the arguments."""
    if kind == "l1":
        return (student - teacher).abs().sum(), (student - teacher).sign().nan_to_num(0), (teacher - student).sign().nan_to_num(0)
    log_q, log_p = ((logits / temperature).log_softmax(dim=1) for logits in (student, teacher))
    q, p = log_q.exp(), log_p.exp()
    if kind == "kl":
        ratio = (log_p - log_q).masked_fill(p == 0, 0)
        row = (p * ratio).sum(dim=1, keepdim=True)
        return row.sum(), (q - p) / temperature, p * (ratio - row) / temperature
    log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0, dtype=q.dtype).log()
    q_ratio, p_ratio = ((log - log_m).masked_fill(side == 0, 0) for side, log in ((q, log_q), (p, log_p)))
    q_row, p_row = ((side * ratio).sum(dim=1, keepdim=True) for side, ratio in ((q, q_ratio), (p, p_ratio)))
    student_grad, teacher_grad = q * (q_ratio - q_row), p * (p_ratio - p_row)
    return (q_row + p_row).sum() / 2, student_grad / 2 / temperature, teacher_grad / 2 / temperature


def forward(kind: str, student: Tensor, teacher: Tensor, *, temperature: float = 1.5, scale: float = 0.25) -> tuple[Tensor, ...]:
    """loss, student_grad_unscaled, teacher_grad_unscaled, agree."""
    if kind == "l1":
        loss, sign, agree = discrepancy.l1_forward(student, teacher, scale, True, True)
        return loss, sign, -sign, agree
    function = discrepancy.kl_forward if kind == "kl" else discrepancy.js_forward
    return function(student, teacher, temperature, scale, True, True, True)


def check_discrepancy(kind: str, student: Tensor, teacher: Tensor, temperature: float = 1.5) -> tuple[Tensor, ...]:
    results = forward(kind, student, teacher, temperature=temperature)
    oracle = losses(kind, student.double(), teacher.double(), temperature)
    plain = losses(kind, student.float(), teacher.float(), temperature)
    assert_accurate(results[0], 0.25 * oracle[0], 0.25 * plain[0], terms=student.numel() / student.shape[1])
    assert_accurate(results[1], oracle[1], plain[1])
    assert_accurate(results[2], oracle[2], plain[2])
    assert results[3].item() == (student.argmax(dim=1) == teacher.argmax(dim=1)).sum().item()
    assert [result.dtype for result in results] == [
        torch.float32,
        *([torch.int8] * 2 if kind == "l1" else [student.dtype, teacher.dtype]),
        torch.int64,
    ]
    assert results[1].stride() == torch.empty_like(student).stride()
    assert kind == "l1" or results[2].stride() == torch.empty_like(teacher).stride()
    return results


SHAPES = [(3, 1), (1, 2), (70, 10), (9, 100), (2, 365), (2, 1001), (1, 9000), (2, 11, 5, 7), (1, 3, 1, 1), (40, 2, 1, 1), (1, 300, 3, 3)]


@pytest.mark.parametrize("kind", ["l1", "kl", "js"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float16, torch.float32), (torch.bfloat16,) * 2])
def test_discrepancy_of_any_shape(kind: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check_discrepancy(kind, random(*shape, dtype=dtypes[0]), random(*shape, dtype=dtypes[1]))


@pytest.mark.parametrize("kind", ["l1", "kl", "js"])
@pytest.mark.parametrize("shape", [(5, 12), (2, 12, 3, 5)])
@pytest.mark.parametrize("layouts", [*zip(LAYOUTS, LAYOUTS, strict=True), *itertools.pairwise(LAYOUTS)])
def test_discrepancy_of_any_strides(kind: str, shape: tuple[int, ...], layouts: tuple[str, str]) -> None:
    student, teacher = (random(*shape, layout=layout) for layout in layouts)
    results = check_discrepancy(kind, student, teacher)
    for first, second in zip(results, forward(kind, student, teacher), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("kind", ["l1", "kl", "js"])
@pytest.mark.parametrize("classes", [2, 40, 9000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_discrepancy_of_logits_of_ten_thousand(kind: str, classes: int, dtype: torch.dtype) -> None:
    student, teacher = (1e4 * random(2, classes, dtype=dtype).sign() + random(2, classes, dtype=dtype) for _ in range(2))
    check_discrepancy(kind, student, teacher, 1.0)


@pytest.mark.parametrize("kind", ["l1", "kl", "js"])
@pytest.mark.parametrize("shape", [(3, 100), (1, 9000), (2, 11, 5, 7)])
def test_discrepancy_of_equal_logits_is_exactly_0(kind: str, shape: tuple[int, ...]) -> None:
    logits = 10 * random(*shape)
    loss, student_grad, _, agree = forward(kind, logits, logits.clone())
    assert loss.item() == 0
    assert not student_grad.any()
    assert agree.item() == logits.numel() // shape[1]


@pytest.fixture(params=["in one tile", "in a loop"])
def _classes_are_read(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in a loop":
        monkeypatch.setattr(discrepancy, "MAX_REGISTER_TILE", 8)
        monkeypatch.setattr(discrepancy, "BLOCK", 8)


@pytest.mark.usefixtures("_classes_are_read")
@pytest.mark.parametrize("kind", ["l1", "kl", "js"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_infinities_and_nan_propagate_as_in_pytorch(kind: str, value: float) -> None:
    student, teacher = random(6, 21), random(6, 21)
    student[0, 3] = teacher[1, 5] = student[2, 6] = teacher[2, 6] = student[2, 0] = student[3, -1] = value
    student[4], teacher[5, :10] = value, value
    for row in range(6):
        check_discrepancy(kind, student[row : row + 1], teacher[row : row + 1])


@pytest.mark.usefixtures("_classes_are_read")
@pytest.mark.parametrize("kind", ["l1", "kl"])
def test_agreement_takes_the_first_maximum_and_the_first_nan(kind: str) -> None:
    late = 17
    special: list[dict[int, float]] = [
        {0: 9.0, late: 9.0},
        {late: 9.0},
        {1: NAN, late: NAN},
        {1: INF, late: NAN},
        dict.fromkeys(range(20), -INF),
        dict.fromkeys(range(21), -INF),
        {1: -0.0, 2: 0.0},
        {2: 0.0, 3: -0.0},
    ]
    rows = torch.full((len(special), 21), -1.0, device=DEVICE)
    for row, values in zip(rows, special, strict=True):
        for index, value in values.items():
            row[index] = value
    pairs = list(itertools.product(range(len(rows)), repeat=2))
    student, teacher = (rows[[pair[side] for pair in pairs]] for side in (0, 1))
    for start in range(0, len(pairs), 4):  # one by one is slow in the interpreter, all at once could hide an error
        part = slice(start, start + 4)
        expected = (student[part].argmax(dim=1) == teacher[part].argmax(dim=1)).sum().item()
        assert forward(kind, student[part], teacher[part])[3].item() == expected


@pytest.mark.parametrize(("shape", "dtype"), [((9, 100), torch.float32), ((2, 11, 5, 7), torch.float32), ((1, 9000), torch.float16)])
def test_outputs_not_requested_are_empty_and_change_nothing(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    student, teacher = random(*shape), random(*shape, dtype=dtype)
    everything = discrepancy.kl_forward(student, teacher, 2.0, 0.5, True, True, True)
    for requested in [(False, False, False), (True, False, False), (False, True, False), (False, False, True)]:
        some = discrepancy.kl_forward(student, teacher, 2.0, 0.5, *requested)
        assert torch.equal(some[0], everything[0])
        for flag, part, complete in zip(requested, some[1:], everything[1:], strict=True):
            assert torch.equal(part, complete) if flag else part.shape == (0,)
            assert part.dtype == complete.dtype
    for gradient, agreement in itertools.product([False, True], repeat=2):
        loss, sign, agree = discrepancy.l1_forward(student, teacher, 0.5, gradient, agreement)
        assert_accurate(loss, 0.5 * (student.double() - teacher.double()).abs().sum(), loss)
        assert (sign.dtype, agree.dtype) == (torch.int8, torch.int64)
        assert torch.equal(sign, (student - teacher.float()).sign().to(torch.int8)) if gradient else sign.shape == (0,)
        assert agree.shape == (() if agreement else (0,))


@pytest.mark.parametrize(("kind", "shape"), [("l1", (512, 10)), ("kl", (512, 10)), ("js", (256, 10)), ("kl", (60, 16, 1, 1))])
def test_small_logits_need_one_launch_per_pass(kind: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[Any] = []

    def counted(on: Tensor, kernel: Any, *arguments: Any, **options: Any) -> None:
        launches.append(kernel)
        launch(on, kernel, *arguments, **options)

    monkeypatch.setattr(discrepancy, "launch", counted)
    student, teacher = random(*shape), random(*shape)
    if kind == "l1":
        discrepancy.l1_forward(student, teacher, 0.25, True, False)
    else:
        check_discrepancy(kind, student, teacher)
    assert len(launches) == 1
    discrepancy.scale_gradients_(student, teacher, torch.tensor(2.0, device=DEVICE), 0.5, 0.5)
    assert len(launches) == 2


@pytest.mark.parametrize("shape", [(0, 10), (0, 3, 4, 4), (2, 3, 0, 4)])
def test_discrepancy_of_empty_logits_is_0(shape: tuple[int, ...]) -> None:
    for kind in ("l1", "kl", "js"):
        loss, student_grad, teacher_grad, agree = forward(kind, random(*shape), random(*shape))
        assert (loss.item(), agree.item(), student_grad.shape, teacher_grad.shape) == (0.0, 0, shape, shape)


@pytest.mark.parametrize("dtype", [torch.int8, *DTYPES])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7, 4, 50)])
def test_gradients_are_scaled_by_the_upstream_gradient(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    upstream = torch.tensor(-0.3, device=DEVICE)
    grad_unscaled = random(*shape, layout="channels_last" if len(shape) == 4 else "contiguous").clamp(-1, 1).to(dtype)
    factor = upstream.double() * 0.7
    # Signs (int8) are scaled to any dtypes; other gradients keep their dtype.
    for student_dtype, teacher_dtype in zip(DTYPES, [*DTYPES[1:], DTYPES[0]], strict=True) if dtype == torch.int8 else [(dtype, dtype)]:
        arguments = upstream, 0.7, -0.7, student_dtype, teacher_dtype
        student_grad, teacher_grad = discrepancy.scale_gradients(grad_unscaled, grad_unscaled, *arguments)
        for result, expected, dtype_of_side in (
            (student_grad, factor * grad_unscaled.double(), student_dtype),
            (teacher_grad, -factor * grad_unscaled.double(), teacher_dtype),
        ):
            assert result.dtype == dtype_of_side
            assert result.stride() == grad_unscaled.stride()
            assert_accurate(result, expected, expected.float(), slack=2)
        alone, nothing = discrepancy.scale_gradients(grad_unscaled, grad_unscaled.new_empty(0), *arguments)
        assert torch.equal(alone, student_grad)
        assert (nothing.shape, nothing.dtype) == ((0,), teacher_dtype)
        nothing, alone = discrepancy.scale_gradients(grad_unscaled.new_empty(0), grad_unscaled, *arguments)
        assert torch.equal(alone, teacher_grad)
        assert (nothing.shape, nothing.dtype) == ((0,), student_dtype)


# ------------------------------------------------------------------------------------------------ images

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda x: x, "tanh": torch.tanh, "sigmoid": torch.sigmoid}
SLOPES: dict[str, Callable[[Tensor], Tensor]] = {"none": torch.ones_like, "tanh": lambda y: 1 - y * y, "sigmoid": lambda y: y * (1 - y)}
IMAGES = [(4, 3, 6, 7), (1, 1, 1, 1), (5, 17, 1, 1), (1, 70, 3, 3), (1, 2, 40, 60)]
ANY_IMAGES = [*itertools.product(IMAGES, ["contiguous", "channels_last"]), *itertools.product([(3, 5, 2, 4)], LAYOUTS[2:])]


def per_channel(constants: Tensor) -> Tensor:
    return constants[:, None, None]


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_activations_have_small_relative_errors(activation: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.logspace(-30, 0, 999), torch.tensor([0.0, INF, -INF, NAN, 1e30, -1e30])])
    x = x.to(DEVICE).view(1, 1, 1, -1)
    y = concat.concat_forward([x], activation, None, None, torch.float32, True)
    exact = FUNCTIONS[activation](x.double())
    assert torch.equal(y.isnan(), exact.isnan())
    small = x.abs() <= 12
    assert ((y.double() - exact)[small].abs() / exact[small].abs().clamp(min=1e-40)).max() < (4e-7 if activation == "tanh" else 2e-6)
    assert torch.equal(y[0, 0, 0, -5:-3], exact[0, 0, 0, -5:-3].float())


def moments_of(x: Tensor, activation: str, blocks: int = 3) -> tuple[Tensor, ...]:
    """Return E[x] and E[x²] in float64, mean and variance."""
    sums, center = moments.partial_moments(x, activation, blocks if x.numel() else 0)
    raw, combined = (moments.combine_moments([sums], [center], None, None, raw)[0][:, 0] for raw in (True, False))
    return *raw, *combined


@pytest.mark.parametrize(("shape", "layout"), ANY_IMAGES)
@pytest.mark.parametrize(("activation", "dtype"), list(zip(ACTIVATIONS, DTYPES, strict=True)))
def test_moments_of_any_images(shape: tuple[int, ...], layout: str, activation: str, dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype, layout=layout)
    results = moments_of(x, activation)
    dims, (y, rough) = (0, 2, 3), (FUNCTIONS[activation](x.to(precision)) for precision in (torch.float64, torch.float32))
    assert_accurate(results[0], y.mean(dims), rough.mean(dims), terms=4 * y.abs().max().item())
    assert_accurate(results[1], y.square().mean(dims), rough.square().mean(dims), terms=4 * y.square().max().item())
    assert_accurate(results[2], y.mean(dims), rough.mean(dims))
    assert_accurate(results[3], y.var(dims, unbiased=False), rough.var(dims, unbiased=False))
    assert [result.dtype for result in results] == [torch.float64, torch.float64, torch.float32, torch.float32]
    for first, second in zip(results, moments_of(x, activation), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_variance_is_accurate_for_a_mean_of_a_thousand_deviations(layout: str) -> None:
    x = random(4, 3, 30, 30, layout=layout) / 2 + 1000
    *_, mean, variance = moments_of(x, "none")
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=EPS, atol=0)
    torch.testing.assert_close(variance.double(), x.double().var((0, 2, 3), unbiased=False), rtol=1e-5, atol=0)


def test_moments_of_nonfinite_and_empty_inputs() -> None:
    x = random(2, 4, 3, 3)
    x[0, 0, 0, 0] = x[1, 1, 2, 2] = -INF
    x[0, 2, 0, 0], x[1, 3, 1, 1] = NAN, NAN
    raw_mean, raw_square, mean, variance = moments_of(x, "none")
    torch.testing.assert_close(raw_mean, x.double().mean((0, 2, 3)), equal_nan=True)
    torch.testing.assert_close(raw_square, x.double().square().mean((0, 2, 3)), equal_nan=True)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)), equal_nan=True)
    assert variance.isnan().all()
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)):
        results = moments_of(random(*shape), "tanh")
        assert all(result.isnan().all() for result in results)
        assert moments.moments_backward(random(*shape), results[2], results[3], results[2], 1.0).shape == shape


@pytest.mark.parametrize(("shape", "layout"), ANY_IMAGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_of_the_moments(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype, layout=layout)
    grad_mean, grad_variance, center = (random(shape[1]) for _ in range(3))
    result = moments.moments_backward(x, grad_mean, grad_variance, center, 0.3)
    assert (result.dtype, result.stride()) == (dtype, torch.empty_like(x).stride())
    exact, plain = (
        0.3
        * (per_channel(grad_mean).to(precision) + 2 * per_channel(grad_variance).to(precision) * (x.to(precision) - per_channel(center)))
        for precision in (torch.float64, torch.float32)
    )
    assert_accurate(result, exact, plain)


def constants(generators: int, channels: int, form: str) -> tuple[Tensor | None, Tensor | None]:
    if form == "none":
        return None, None
    if form == "expanded":
        return random(channels).expand(generators, channels), (random(channels).abs() + 0.5).expand(generators, channels)
    return random(channels, generators).t(), (random(channels, generators).abs() + 0.5).t()


def constants_of(mean: Tensor | None, std: Tensor | None, generator: int) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if mean is None or std is None else (mean[generator], std[generator])


def normalized(raw: Tensor, activation: str, mean: Tensor | None, std: Tensor | None) -> Tensor:
    y = FUNCTIONS[activation](raw)
    return y if mean is None or std is None else (y - per_channel(mean)) / per_channel(std)


@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize(("activation", "form", "dtype"), list(zip(ACTIVATIONS, ["transposed", "expanded", "none"], DTYPES, strict=True)))
@pytest.mark.parametrize("channels_last", [False, True])
def test_concatenation(shape: tuple[int, ...], activation: str, form: str, dtype: torch.dtype, channels_last: bool) -> None:
    layouts = ["contiguous", "contiguous", "channels_last", "expanded"]
    raws = [
        random(count, *shape[1:], dtype=raw_dtype, layout=layout)
        for count, raw_dtype, layout in zip((shape[0], 0, 2, 1), [dtype, torch.float16, torch.float32, dtype], layouts, strict=True)
    ]
    mean, std = constants(len(raws), shape[1], form)
    exact, plain = (
        torch.cat([normalized(raw.to(precision), activation, *constants_of(mean, std, index)) for index, raw in enumerate(raws)])
        for precision in (torch.float64, torch.float32)
    )
    out = concat.concat_forward(raws, activation, mean, std, dtype, channels_last)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert_accurate(out, exact, plain)


@pytest.mark.parametrize(("shape", "layout"), ANY_IMAGES)
@pytest.mark.parametrize(("activation", "form", "dtype"), list(zip(ACTIVATIONS, ["transposed", "none", "expanded"], DTYPES, strict=True)))
def test_gradient_of_the_concatenation(shape: tuple[int, ...], layout: str, activation: str, form: str, dtype: torch.dtype) -> None:
    raw, gradient = random(*shape, dtype=dtype, layout=layout), random(shape[0] + 2, *shape[1:], dtype=dtype, layout="channels_last")[1:-1]
    center, scale = constants_of(*constants(2, shape[1], form), 1)
    result = concat.concat_backward(gradient, raw, activation, center, scale, None, None)
    assert (result.dtype, result.stride()) == (dtype, torch.empty_like(raw).stride())
    exact, plain = (
        gradient.to(precision) * SLOPES[activation](FUNCTIONS[activation](raw.to(precision)))
        for precision in (torch.float64, torch.float32)
    )
    if scale is not None:
        exact, plain = exact / per_channel(scale), plain / per_channel(scale)
    assert_accurate(result, exact, plain)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_sigmoid_and_its_gradient_in_half_precision(dtype: torch.dtype) -> None:
    raw, gradient = (random(3, 3, 9, 7, dtype=dtype, layout="channels_last") for _ in range(2))
    out = concat.concat_forward([raw], "sigmoid", None, None, dtype, True)
    result = concat.concat_backward(gradient, raw, "sigmoid", None, None, None, None)
    y, plain = raw.double().sigmoid(), raw.float().sigmoid()
    assert_accurate(out, y, plain)
    assert_accurate(result, gradient.double() * y * (1 - y), gradient.float() * plain * (1 - plain))


@pytest.mark.parametrize(("shape", "layout"), ANY_IMAGES)
@pytest.mark.parametrize(("activation", "dtype"), list(zip(ACTIVATIONS, DTYPES, strict=True)))
def test_gradient_through_batch_statistics(shape: tuple[int, ...], layout: str, activation: str, dtype: torch.dtype) -> None:
    raw, gradient = random(*shape, dtype=dtype, layout=layout), random(*shape, dtype=dtype, layout="channels_last")
    center, scale = constants_of(*constants(2, shape[1], "transposed"), 1)
    assert center is not None
    assert scale is not None
    mean, dot = concat.concat_gradient_moments(gradient, raw, activation, center, scale)
    result = concat.concat_backward(gradient, raw, activation, center, scale, mean, dot)
    expected = []
    for precision in (torch.float64, torch.float32):
        g, y, std = gradient.to(precision), FUNCTIONS[activation](raw.to(precision)), per_channel(scale.to(precision))
        hat = (y - per_channel(center.to(precision))) / std
        centered = g - per_channel(mean.to(precision)) - hat * per_channel(dot.to(precision))
        expected.append((g.mean((0, 2, 3)), (g * hat).mean((0, 2, 3)), centered / std * SLOPES[activation](y)))
    terms = gradient.abs().max().item(), (g * hat).abs().max().item(), 0.0
    for actual, exact, plain, of_sum in zip((mean, dot, result), *expected, terms, strict=True):
        assert_accurate(actual, exact, plain, terms=of_sum)


def test_gradient_moments_of_empty_inputs_are_nan() -> None:
    nothing, one = random(0, 3, 2, 2), torch.ones(3, device=DEVICE)
    assert all(result.isnan().all() for result in concat.concat_gradient_moments(nothing, nothing, "tanh", one, one))


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_is_written_and_nothing_else(dtype: torch.dtype) -> None:
    raws = [random(2, 3, 4, 7), random(1, 3, 4, 7)]
    expected = concat.concat_forward(raws, "tanh", None, None, dtype, False)
    whole = torch.full((5, 3, 6, 14), NAN, device=DEVICE, dtype=dtype)
    for out in (whole[1:-1, :, 1:-1, ::2], whole.to(memory_format=torch.channels_last)[1:-1, :, 1:-1, :7]):
        storage = out._base
        assert storage is not None
        concat.concat_forward_out(out, raws, "tanh", None, None)
        assert torch.equal(out, expected)
        assert int(storage.isnan().sum()) == storage.numel() - out.numel()


# ------------------------------------------------------------------------------------------------ the moving average


def check_ema(averages: list[Tensor], sources: list[Tensor], shadows: list[Tensor], decay: float, device_decay: Tensor | None) -> None:
    weight = 1 - (decay if device_decay is None else device_decay.item())
    exact, plain = (
        [
            torch.lerp(average.to(precision), source.to(precision), weight) if average.is_floating_point() else source.clone()
            for average, source in zip(averages, sources, strict=True)
        ]
        for precision in (torch.float64, torch.float32)
    )
    ema.ema_update_(averages, sources, shadows, decay, device_decay)
    for average, *expected in zip(averages, exact, plain, strict=True):
        if average.numel():
            assert_accurate(average, *expected, slack=2)
    for average, shadow in zip(averages, shadows, strict=False):
        assert torch.equal(shadow, average.to(shadow.dtype))


@pytest.mark.parametrize("source_dtype", DTYPES)
@pytest.mark.parametrize("shadow_dtype", [None, *DTYPES])
def test_average_of_tensors_of_any_size(source_dtype: torch.dtype, shadow_dtype: torch.dtype | None) -> None:
    averages = [random(size)[start:] for size, start in [(1, 0), (2048, 0), (4097, 1), (0, 0), (4095, 0)]]
    sources = [random(average.numel()).to(source_dtype) for average in averages]
    shadows = [random(average.numel()).to(shadow_dtype) for average in averages] if shadow_dtype else []
    for value in (torch.tensor(3), torch.tensor(True), torch.arange(6, dtype=torch.uint8)):
        averages.append(torch.zeros_like(value, device=DEVICE))
        sources.append(value.to(DEVICE))
        shadows += [torch.zeros_like(value, device=DEVICE)] if shadow_dtype else []
    check_ema(averages, sources, shadows, 0.999, None)
    decay_dtype = torch.float64 if source_dtype == shadow_dtype else torch.float32
    for decay in (0.25, 0.999):
        check_ema(averages, sources, shadows, NAN, torch.tensor(decay, device=DEVICE, dtype=decay_dtype))


def test_average_of_more_tensors_than_one_launch_supports() -> None:
    averages, sources = ([random(size) for size in range(1, 2 * ema.MAX_SEGMENTS)] for _ in range(2))
    check_ema(averages, sources, [], 0.9, None)


def test_average_with_decay_0_and_1() -> None:
    average, source = random(300), random(300)
    before = average.clone()
    ema.ema_update_([average], [source], [], 1.0, None)
    assert torch.equal(average, before)
    ema.ema_update_([average], [average.clone()], [], 0.7, None)
    assert torch.equal(average, before)
    ema.ema_update_([average], [source], [], 0.0, None)
    assert torch.equal(average, source)
    ema.ema_update_([], [], [], 0.5, None)


def test_tensors_contiguous_in_every_list_form_one_segment() -> None:
    sizes = [3, 64, 1000, 2, 5000]
    arenas = [random(sum(sizes) + 2, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    lists = [list(arena[1:-1].split(sizes)) for arena in arenas]
    edges = [arena[[0, -1]].clone() for arena in arenas]
    assert len(ema._segments(*lists)) == 1
    check_ema(lists[0], lists[1], lists[2], 0.9, None)
    assert all(torch.equal(arena[[0, -1]], edge) for arena, edge in zip(arenas, edges, strict=True))

    for moved in range(3):
        lists[moved][2] = lists[moved][2].clone()
        assert len(ema._segments(*lists)) == 3
        check_ema(lists[0], lists[1], lists[2], 0.9, None)
        lists[moved] = list(arenas[moved][1:-1].split(sizes))


# ------------------------------------------------------------------------------------------------ all


@pytest.mark.alone
def test_offsets_beyond_31_bits() -> None:
    torch.use_deterministic_algorithms(False)  # would fill gigabytes of which a few bytes are read
    step = 2**31 // 3 + 5
    memory, other = (torch.empty(3 * step + 64, dtype=torch.float16, device=DEVICE) for _ in range(2))
    for size, stride in (((4, 8), (step, 3)), ((8, 4), (3, step))):
        logits = memory.as_strided(size, stride)
        logits.copy_(random(*size))
        check_discrepancy("kl", logits, logits.flip(1).float())
    for shape, strides in (((4, 2, 2, 2), (step, 3, 12, 1)), ((2, 2, 4, 2), (3, 12, step, 1))):
        images, out = memory.as_strided(shape, strides), other.as_strided(shape, strides)
        images.copy_(random(*shape))
        mean, *_ = moments_of(images, "none")
        assert_accurate(mean, images.double().mean((0, 2, 3)), images.float().mean((0, 2, 3)))
        concat.concat_forward_out(out, [images], "none", None, None)
        assert torch.equal(out, images)


@pytest.mark.parametrize("shape", [(0, 10), (0, 3, 4, 4), (2, 3, 0, 4)])
@pytest.mark.parametrize("dtype", [torch.int8, *DTYPES])
def test_gradients_of_empty_logits_have_their_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    grad_unscaled = torch.empty(shape, dtype=dtype, device=DEVICE)
    gradients = discrepancy.scale_gradients(
        grad_unscaled, grad_unscaled, torch.ones((), device=DEVICE), 1.0, -1.0, torch.float16, torch.float32
    )
    assert [(gradient.shape, gradient.dtype) for gradient in gradients] == [(shape, torch.float16), (shape, torch.float32)]
