from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dfkd_fast.kernels import Backend, channel_moments, channel_sums, combine_moments, partial_moments, use_backend
from tests.kernels import oracles
from tests.kernels.oracles import (
    INF,
    KERNEL_DTYPES,
    LAYOUTS,
    NAN,
    PROPERTY,
    RUNS,
    SANITIZED_DTYPES,
    assert_as_accurate_as_pytorch,
    layouts,
    random,
    with_layout,
)

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [
    *[(1, 1, 1, 1), (2, 1, 3, 5), (3, 2, 5, 7), (1, 10, 1, 3), (2, 100, 3, 1), (2, 365, 3, 3), (1, 1001, 2, 1)],
    *[(5, 3, 61, 59), (3, 64, 15, 17), (9, 1000, 4, 1)],  # several blocks, the last one incomplete
]


def sums(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.sum(dim=(0, 2, 3)), x.square().sum(dim=(0, 2, 3))


def compare(function: Callable[[Tensor], tuple[Tensor, Tensor]], oracle: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> None:
    """Compare both results, and the gradient of a combination of them, with float64."""
    size = x.detach().abs().max().item() if x.numel() else 0.0
    magnitude = size if function is channel_moments else x.numel() // x.shape[1] * size  # where the elements cancel
    exact_x, plain_x = x.detach().double().requires_grad_(), x.detach().clone().requires_grad_()
    weights = torch.randn(2, x.shape[1], dtype=torch.float64).to(x.device)
    results, gradients = [], []
    for leaf, (first, second) in ((x, function(x)), (plain_x, oracle(plain_x.float())), (exact_x, oracle(exact_x))):
        mixture = first * weights[0].to(first) + second * weights[1].to(second)
        gradients.append(torch.autograd.grad(mixture.tanh(), leaf, torch.full_like(mixture, -1.5))[0])
        results.append((first.detach(), second.detach()))
    for actual, plain, exact in zip(*results, strict=True):
        assert_as_accurate_as_pytorch(actual, plain.to(actual.dtype), exact, magnitude=magnitude)
    assert gradients[0].dtype == x.dtype
    assert_as_accurate_as_pytorch(*gradients)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_moments_and_sums_match_float64(backend: Backend, device: torch.device, layout: str, shape: tuple[int, ...]) -> None:
    x = random(*shape, layout=layout, device=device)
    compare(channel_moments, oracles.moments, x)
    compare(lambda x: channel_sums(x)[:2], sums, x)


@pytest.mark.parametrize("shape", [(4, 5, 3, 7), (3, 70, 2, 3)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_every_layout_and_dtype_is_computed_in_float32(
    backend: Backend, device: torch.device, dtype: torch.dtype, layout: str, shape: tuple[int, ...]
) -> None:
    x = random(*shape, dtype=dtype, layout=layout, device=device)
    compare(channel_moments, oracles.moments, x)
    compare(lambda x: channel_sums(x)[:2], sums, x)
    mean, variance = channel_moments(x)
    total, square_total, count = channel_sums(x)
    assert mean.dtype == variance.dtype == torch.float32
    assert total.dtype == square_total.dtype == torch.float64
    assert count == x.numel() // x.shape[1]


@pytest.mark.parametrize("shape", RUNS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "misaligned"])
@pytest.mark.parametrize("dtype", SANITIZED_DTYPES, ids=str)
def test_vectorized_accesses_match_scalar_accesses(
    backend: Backend, device: torch.device, dtype: torch.dtype, layout: str, shape: tuple[int, ...]
) -> None:
    x = random(*shape, dtype=dtype, layout=layout, device=device)
    compare(channel_moments, oracles.moments, x)
    compare(lambda x: channel_sums(x)[:2], sums, x)


@PROPERTY
@given(data=st.data(), dtype=st.sampled_from(KERNEL_DTYPES), mean=st.floats(-10, 10))
def test_any_shape_and_strides(fused: Backend, device: torch.device, data: st.DataObject, dtype: torch.dtype, mean: float) -> None:
    channels = data.draw(st.one_of(st.integers(1, 20), st.integers(60, 140)))
    shape = (data.draw(st.integers(1, 6)), channels, data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12)))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    x = data.draw(layouts(4))((mean + torch.randn(shape)).to(device, dtype)).detach().requires_grad_()
    compare(channel_moments, oracles.moments, x)
    compare(lambda x: channel_sums(x)[:2], sums, x)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("mean", "std"), [(100.0, 0.1), (-1e4, 1.0)])
def test_the_variance_is_accurate_for_a_large_mean(backend: Backend, device: torch.device, mean: float, std: float, layout: str) -> None:
    x = with_layout((mean + std * torch.randn(8, 5, 33, 31)).to(device), layout)
    exact_mean, exact_variance = oracles.moments(x.double())
    actual_mean, actual_variance = channel_moments(x)
    torch.testing.assert_close(actual_mean.double(), exact_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(actual_variance.double(), exact_variance, rtol=1e-4, atol=0)
    total, square_total, count = channel_sums(x)
    torch.testing.assert_close(square_total / count - (total / count).square(), exact_variance, rtol=1e-4, atol=0)


def test_moments_of_a_slice_with_a_mean_of_a_million_deviations(backend: Backend, device: torch.device) -> None:
    x = (torch.randn(8, 4, 60, 61) + 1e6).to(device)[:, 2:3, 1:, 1:60]
    exact_mean, exact_variance = oracles.moments(x.double())
    mean, variance = channel_moments(x)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), exact_variance, rtol=1e-2, atol=0)


@pytest.mark.parametrize("value", [0.0, 3.3e4, -0.1])
def test_the_variance_of_a_constant_is_0_and_not_negative(backend: Backend, device: torch.device, value: float) -> None:
    mean, variance = channel_moments(torch.full((4, 3, 17, 13), value, device=device))
    torch.testing.assert_close(mean, torch.full_like(mean, value))
    assert (variance >= 0).all()
    assert (variance <= 1e-12 * value**2).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_sums_of_sub_batches_give_the_moments_of_the_batch(backend: Backend, device: torch.device, layout: str) -> None:
    x = random(7, 5, 9, 11, layout=layout, device=device)
    parts = [channel_sums(part) for part in x.split([1, 4, 2])]
    total, square_total = sum(part[0] for part in parts), sum(part[1] for part in parts)
    count = sum(part[2] for part in parts)
    assert isinstance(total, Tensor)
    assert isinstance(square_total, Tensor)
    mean, variance = channel_moments(x)
    torch.testing.assert_close((total / count).float(), mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close((square_total / count - (total / count).square()).float(), variance, rtol=1e-6, atol=0)
    whole = channel_sums(x)
    torch.testing.assert_close(total, whole[0], rtol=1e-6, atol=1e-4)  # a sum of 700 numbers in float32 would be off by 1e-3
    torch.testing.assert_close(square_total, whole[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5)], ids=str)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_empty_inputs_have_sums_0_and_moments_nan(
    backend: Backend, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = random(*shape, dtype=dtype, device=device)
    mean, variance = channel_moments(x)
    assert mean.isnan().all()
    assert variance.isnan().all()
    total, square_total, count = channel_sums(x)
    assert not total.any()
    assert not square_total.any()
    assert count == 0
    for first, second in ((mean, variance), (total, square_total)):
        (gradient,) = torch.autograd.grad(first.sum() + second.sum(), x)
        assert (gradient.shape, gradient.dtype) == (shape, dtype)


def test_no_channels_give_empty_results(backend: Backend, device: torch.device) -> None:
    x = random(2, 0, 4, 5, device=device)
    assert all(result.shape == (0,) for result in (*channel_moments(x), *channel_sums(x)[:2]))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("index", [(0, 1, 0, 0), (2, 1, 3, 2)])
def test_nonfinite_values_propagate_within_a_channel_as_in_torch_mean_and_var(
    backend: Backend, device: torch.device, index: tuple[int, ...], value: float, layout: str
) -> None:
    values = torch.randn(3, 4, 5, 3)
    values[index] = value
    x = with_layout(values.to(device), layout).requires_grad_()
    for results, oracle in ((channel_moments(x), oracles.moments(x)), (channel_sums(x)[:2], sums(x))):
        gradients = [torch.autograd.grad(first.sum() + second.sum(), x)[0] for first, second in (results, oracle)]
        for actual, usual in zip((*results, gradients[0]), (*oracle, gradients[1]), strict=True):
            torch.testing.assert_close(actual, usual.to(actual.dtype), equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("function", [channel_moments, channel_sums])
def test_each_result_is_differentiable_on_its_own(
    backend: Backend, device: torch.device, function: Callable[[Tensor], tuple[Tensor, ...]], index: int
) -> None:
    x = random(3, 4, 5, 3, device=device)
    (gradient,) = torch.autograd.grad(function(x)[index].sum(), x)
    twin = x.detach().double().requires_grad_()
    oracle = oracles.moments if function is channel_moments else sums
    (exact,) = torch.autograd.grad(oracle(twin)[index].sum(), twin)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_has_the_strides_of_empty_like(fused: Backend, device: torch.device, layout: str) -> None:
    x = random(3, 5, 4, 2, layout=layout, device=device)
    for function in (channel_moments, channel_sums):
        (gradient,) = torch.autograd.grad(function(x)[1].sum(), x)
        assert gradient.stride() == torch.empty_like(x).stride()


def test_the_reference_has_first_and_second_derivatives() -> None:
    x = random(3, 2, 2, 3, dtype=torch.float64)
    for function in (channel_moments, lambda x: channel_sums(x)[:2]):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


def test_double_backward_through_a_kernel_raises(fused: Backend, device: torch.device) -> None:
    x = random(3, 4, 5, 3, device=device)
    for function in (channel_moments, channel_sums):
        (gradient,) = torch.autograd.grad(function(x)[1].square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r'no second derivative.*use_backend\("reference"\)'):
            gradient.sum().backward()


@pytest.mark.parallel
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_are_bitwise_reproducible_for_any_number_of_threads(fused: Backend, device: torch.device, layout: str) -> None:
    x = random(5, 7, 61, 59, layout=layout, device=device)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        mean, variance = channel_moments(x)
        results.append((mean, variance, *channel_sums(x)[:2], *torch.autograd.grad((mean * variance).sum(), x)))
    for again in results[1:]:
        assert all(map(torch.equal, results[0], again))


def layers(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Activations of layers of different sizes and layouts, with means far from 0."""
    shapes = {"contiguous": (3, 5, 33, 31), "channels_last": (2, 70, 9, 8), "sliced": (4, 3, 5, 2), "transposed": (1, 130, 1, 1)}
    tensors = [random(*shape, layout=layout, device=device, dtype=dtype).detach() + i for i, (layout, shape) in enumerate(shapes.items())]
    return [tensor.requires_grad_() for tensor in tensors]


def combined_oracle(xs: list[Tensor], scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """Means and variances (2, L, C) in the precision of the tensors, padded with zeros."""
    width = max(x.shape[1] for x in xs)
    table = torch.stack([torch.nn.functional.pad(torch.stack(oracles.moments(x)), (0, width - x.shape[1])) for x in xs], dim=1)
    scaled = table if scale is None else table * scale
    return scaled if shift is None else scaled + shift


@pytest.mark.parametrize("affine", [(), ("scale",), ("scale", "shift")], ids=str)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_moments_of_many_tensors_and_their_gradients_match_float64(
    backend: Backend, device: torch.device, dtype: torch.dtype, affine: tuple[str, ...]
) -> None:
    xs = layers(device, dtype)
    constants = torch.randn(2, 2, len(xs), 130, device=device)
    scale, shift = (constant if name in affine else None for name, constant in zip(("scale", "shift"), constants, strict=True))
    results = [(combine_moments([partial_moments(x) for x in xs], scale, shift), xs)]
    for wide in (torch.float32, torch.float64):
        leaves = [x.detach().to(wide if wide == torch.float64 else dtype, copy=True).requires_grad_() for x in xs]
        affine_map = [None if constant is None else constant.to(wide) for constant in (scale, shift)]
        results.append((combined_oracle([leaf.to(wide) for leaf in leaves], *affine_map), leaves))
    weights = torch.randn(2, len(xs), 130, dtype=torch.float64, device=device)
    gradients = [torch.autograd.grad(table.sin(), leaves, weights.to(table)) for table, leaves in results]
    actual, plain, exact = (table.detach() for table, _ in results)
    assert actual.dtype == torch.float32
    assert_as_accurate_as_pytorch(actual, plain, exact, magnitude=4)
    for actual, plain, exact in zip(*gradients, strict=True):
        assert_as_accurate_as_pytorch(actual, plain, exact)


def test_more_tensors_than_one_launch_supports(backend: Backend, device: torch.device) -> None:
    xs = [torch.randn(3, 1 + i % 3, 5, 2).to(device).requires_grad_() for i in range(170)]
    table = combine_moments([partial_moments(x) for x in xs])
    exact = combined_oracle([x.double() for x in xs], None, None)
    torch.testing.assert_close(table.double(), exact, rtol=1e-5, atol=1e-5)
    weights = torch.arange(1.0, table.numel() + 1, device=device).view_as(table).cos()
    for actual, expected in zip(torch.autograd.grad(table, xs, weights), torch.autograd.grad(exact, xs, weights.double()), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_gradient_is_accurate_for_a_large_mean(backend: Backend, device: torch.device, layout: str) -> None:
    x = with_layout((1000 + torch.randn(8, 5, 33, 31)).to(device), layout).requires_grad_()
    exact = x.detach().double().requires_grad_()
    (gradient,) = torch.autograd.grad(combine_moments([partial_moments(x)])[1].sum(), x)
    (expected,) = torch.autograd.grad(oracles.moments(exact)[1].sum(), exact)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_an_empty_tensor_has_moments_nan_beside_others(backend: Backend, device: torch.device) -> None:
    x, empty = torch.ones(2, 3, 4, 5, device=device), torch.ones(0, 2, 4, 5, device=device)
    mean, variance = combine_moments([partial_moments(x), partial_moments(empty)])
    expected = torch.tensor([[1.0, 1.0, 1.0], [NAN, NAN, 0.0]], device=device)
    torch.testing.assert_close(mean, expected, equal_nan=True)
    torch.testing.assert_close(variance, expected - expected.nan_to_num(), equal_nan=True)


def test_tensors_without_a_gradient_have_none(backend: Backend, device: torch.device) -> None:
    xs = layers(device)
    table = combine_moments([partial_moments(x.detach() if i % 2 else x) for i, x in enumerate(xs)])
    gradients = torch.autograd.grad(table.square().sum(), xs, allow_unused=True)
    assert [gradient is None for gradient in gradients] == [False, True] * 2
    assert not combine_moments([partial_moments(x.detach()) for x in xs]).requires_grad


def test_parts_of_the_reference_and_of_a_kernel_combine(fused: Backend, device: torch.device) -> None:
    first, second = layers(device)[:2]
    with use_backend("reference"):
        of_reference = partial_moments(first)
    table = combine_moments([of_reference, partial_moments(second)])
    torch.testing.assert_close(table.double(), combined_oracle([first.double(), second.double()], None, None), rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(table.sin().sum(), (first, second))
    for gradient, x in zip(gradients, (first, second), strict=True):
        (expected,) = torch.autograd.grad(torch.stack(oracles.moments(x.double())).sin().sum(), x)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_double_backward_through_combined_parts_raises(fused: Backend, device: torch.device) -> None:
    x = random(3, 4, 5, 3, device=device)
    with use_backend("reference"):  # which alone would have a second derivative
        parts = partial_moments(x)
    (gradient,) = torch.autograd.grad(combine_moments([parts])[1].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r'combine_moments: .*no second derivative.*use_backend\("reference"\)'):
        gradient.sum().backward()


def test_the_reference_of_combined_moments_has_first_and_second_derivatives() -> None:
    xs = random(3, 2, 2, 3, dtype=torch.float64), random(2, 3, 1, 2, dtype=torch.float64)

    def function(*xs: Tensor) -> Tensor:
        return combine_moments([partial_moments(x) for x in xs])

    assert torch.autograd.gradcheck(function, xs)
    assert torch.autograd.gradgradcheck(function, xs)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4), (2, 3, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("function", [channel_moments, channel_sums])
def test_invalid_shapes_raise(function: Callable[[Tensor], object], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x must be \(N, C, H, W\), not \("):
        function(torch.zeros(shape))
