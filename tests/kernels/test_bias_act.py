from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dfkd_fast.kernels import Backend, bias_act, channel_moments
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

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.clone,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
}
# The last one is several blocks, the last of them incomplete.
SHAPES = [(2, 1, 3, 5), (5, 1, 1, 1), (7, 10, 1, 1), (3, 3, 5, 7), (2, 64, 3, 5), (2, 2048, 1, 1), (3, 3, 33, 31)]


def oracle(x: Tensor, bias: Tensor, residual: Tensor | None, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch in the precision of x."""
    shifted = x + bias.to(x.dtype)[:, None, None]
    return ACTIVATIONS[activation](shifted if residual is None else shifted + residual), *oracles.moments(shifted)


def call(x: Tensor, bias: Tensor, residual: Tensor | None, activation: Any, moments: bool = True) -> tuple[Tensor, ...]:
    if moments:
        return oracles.bias_act_moments(x, bias, residual, activation)
    return (bias_act(x, bias, residual, activation=activation),)


def differentiated(results: tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the results, and the gradients of a weighted sum of them."""
    weights = [torch.arange(1.0, result.numel() + 1).cos().view(result.shape).to(result) for result in results]
    return *(result.detach() for result in results), *torch.autograd.grad(results, inputs, weights)


def compare(x: Tensor, residual: Tensor | None, activation: str, moments: bool = True) -> None:
    """Compare results and gradients with float64."""
    bias = torch.linspace(-1, 1.5, x.shape[1], device=x.device)
    leaves = [tensor for tensor in (x, residual) if tensor is not None]
    results = [differentiated(call(x, bias, residual, activation, moments), leaves)]
    for dtype in (torch.float32, torch.float64):
        copies = [leaf.detach().to(dtype if dtype == torch.float64 else leaf.dtype, copy=True).requires_grad_() for leaf in leaves]
        wide = [copy.to(dtype) for copy in copies]
        y, *rest = oracle(wide[0], bias, None if residual is None else wide[1], activation)
        y = y if dtype == torch.float64 else y.to(x.dtype)
        results.append(differentiated((y, *(rest if moments else ())), copies))
    assert len(results[0]) == len(leaves) + (3 if moments else 1)
    for actual, plain, exact in zip(*results, strict=True):
        assert_as_accurate_as_pytorch(actual, plain, exact, magnitude=4)  # of the terms of the mean, which cancel


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_and_gradients_match_float64(backend: Backend, device: torch.device, layout: str, shape: tuple[int, ...]) -> None:
    compare(random(*shape, layout=layout, device=device), random(*shape, layout=layout, device=device), "silu")


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_with_and_without_residual_and_moments(
    backend: Backend, device: torch.device, activation: str, with_residual: bool, moments: bool
) -> None:
    x, residual = (random(2, 16, 4, 6, layout="channels_last", size=3, device=device) for _ in range(2))
    compare(x, residual if with_residual else None, activation, moments)


@pytest.mark.parametrize(("layout", "other"), [*((layout, layout) for layout in LAYOUTS), ("channels_last", "contiguous")])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_every_layout_and_dtype_is_computed_in_float32(
    backend: Backend, device: torch.device, dtype: torch.dtype, layout: str, other: str
) -> None:
    shape = 3, 70, 2, 3
    compare(random(*shape, dtype=dtype, layout=layout, device=device), random(*shape, dtype=dtype, layout=other, device=device), "silu")


@pytest.mark.parametrize("shape", RUNS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "misaligned"])
@pytest.mark.parametrize("dtype", SANITIZED_DTYPES, ids=str)
def test_vectorized_accesses_match_scalar_accesses(
    backend: Backend, device: torch.device, dtype: torch.dtype, layout: str, shape: tuple[int, ...]
) -> None:
    x, residual = (random(*shape, dtype=dtype, layout=layout, device=device) for _ in range(2))
    compare(x, residual, "silu")
    compare(x, None, "silu", moments=False)


@settings(PROPERTY, max_examples=PROPERTY.max_examples // 4)
@given(data=st.data(), dtype=st.sampled_from(KERNEL_DTYPES), activation=st.sampled_from([*ACTIVATIONS]), moments=st.booleans())
def test_any_shape_and_strides(
    fused: Backend, device: torch.device, data: st.DataObject, dtype: torch.dtype, activation: str, moments: bool
) -> None:
    channels = data.draw(st.one_of(st.integers(1, 20), st.integers(60, 80)))
    shape = (data.draw(st.integers(1, 3)), channels, data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6)))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    x, residual = (data.draw(layouts(4))(torch.randn(shape).to(device, dtype)).detach().requires_grad_() for _ in range(2))
    compare(x, residual if data.draw(st.booleans()) else None, activation, moments)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed"])
def test_results_and_gradients_have_the_strides_of_empty_like(
    fused: Backend, device: torch.device, layout: str, with_residual: bool
) -> None:
    x, residual = random(3, 5, 4, 2, layout=layout, device=device), random(3, 5, 4, 2, device=device) if with_residual else None
    y, mean, _ = call(x, torch.ones(5, device=device), residual, "relu")
    (gradient,) = torch.autograd.grad(y.sum() + mean.sum(), x)
    assert y.stride() == gradient.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("mean", "std"), [(100.0, 0.1), (-1e4, 1.0)])
def test_the_variance_is_accurate_for_a_large_mean(backend: Backend, device: torch.device, mean: float, std: float, layout: str) -> None:
    x, bias = with_layout((mean + std * torch.randn(4, 5, 17, 15)).to(device), layout), torch.full((5,), 0.3 * mean, device=device)
    exact_mean, exact_variance = oracles.moments(x.double() + bias.double()[:, None, None])
    _, actual_mean, actual_variance = call(x, bias, None, "relu")
    torch.testing.assert_close(actual_mean.double(), exact_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(actual_variance.double(), exact_variance, rtol=1e-3, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_moments_are_those_of_channel_moments(backend: Backend, device: torch.device, layout: str) -> None:
    x, bias = random(3, 5, 4, 6, layout=layout, device=device), torch.randn(5).to(device)
    torch.testing.assert_close(call(x, bias, x, "none")[1:], channel_moments(x + bias[:, None, None]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nonfinite_values_propagate_as_in_pytorch(backend: Backend, device: torch.device, layout: str, activation: str) -> None:
    values = torch.randn(3, 9, 5, 3)
    for channel, value in ((1, NAN), (3, INF), (5, -INF)):
        values[0, channel, 0, 0] = values[2, channel + 1, 3, 2] = value
    x, bias = with_layout(values.to(device), layout).requires_grad_(), torch.linspace(-1, 1, 9, device=device)
    results = [differentiated(of, [x]) for of in (call(x, bias, None, activation), oracle(x, bias, None, activation))]
    results = [(*results_[:3], results_[3].where(x.isfinite(), 0)) for results_ in results]  # PyTorch's depends on the position
    torch.testing.assert_close(*results, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [NAN, INF])
def test_nonfinite_values_of_the_residual_do_not_change_the_moments(backend: Backend, device: torch.device, value: float) -> None:
    x, bias, residual = torch.randn(3, 4, 5, 2).to(device), torch.ones(4, device=device), torch.full((3, 4, 5, 2), value, device=device)
    y, mean, variance = call(x, bias, residual, "relu")
    torch.testing.assert_close(y, residual, equal_nan=True)
    torch.testing.assert_close((mean, variance), oracles.moments(x + 1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_derivatives_at_the_kinks_are_those_of_pytorch(backend: Backend, device: torch.device, activation: str, layout: str) -> None:
    kinks = torch.tensor([-3.0, -0.0, 0.0, 3.0, 6.0, -3.0000002, 2.9999998, 6.0000005], device=device)
    x = with_layout(kinks.view(1, 1, 2, 4).expand(2, 8, 2, 4), layout).requires_grad_()
    bias = torch.zeros(8, device=device)
    actual, expected = (differentiated(of[:1], [x]) for of in (call(x, bias, None, activation), oracle(x, bias, None, activation)))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("differentiable", ["x", "residual"])
def test_either_input_alone_may_require_grad(
    backend: Backend, device: torch.device, differentiable: str, activation: Any, moments: bool
) -> None:
    index = ["x", "residual"].index(differentiable)
    inputs = [random(3, 4, 5, 3, device=device).detach().requires_grad_(i == index) for i in range(2)]
    exact = [tensor.detach().double().requires_grad_(i == index) for i, tensor in enumerate(inputs)]
    bias = torch.ones(4, device=device)
    results = call(inputs[0], bias, inputs[1], activation, moments), oracle(exact[0], bias, exact[1], activation)
    gradients: list[Tensor] = []
    for (y, *rest), leaf in zip(results, (inputs[index], exact[index]), strict=True):
        loss = y.sin().sum() + (torch.stack(rest).sin().sum() if moments else 0)
        gradients += torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_each_result_is_differentiable_on_its_own(backend: Backend, device: torch.device, index: int) -> None:
    x, residual, bias = random(3, 4, 5, 3, device=device), random(3, 4, 5, 3, device=device), torch.ones(4, device=device)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, residual)]
    results = call(x, bias, residual, "relu")[index], oracle(exact[0], bias, exact[1], "relu")[index]
    for actual, expected in zip(
        *(
            torch.autograd.grad(result.sin().sum(), leaves, allow_unused=True, materialize_grads=True)
            for result, leaves in zip(results, ((x, residual), exact), strict=True)
        ),
        strict=True,
    ):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_gradients_accumulate_separately(backend: Backend, device: torch.device, activation: Any) -> None:
    x, residual = random(3, 4, 5, 3, device=device), random(3, 4, 5, 3, device=device)
    for _ in range(2):
        bias_act(x, torch.full((4,), 99.0, device=device), residual, activation=activation).sum().backward()
    bias_act(x, torch.full((4,), 99.0, device=device), x, activation=activation).sum().backward()
    assert x.grad is not None
    assert residual.grad is not None
    assert (x.grad == 4).all()
    assert (residual.grad == 2).all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 0, 4, 5)], ids=str)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_empty_inputs_have_moments_nan(backend: Backend, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, residual, bias = random(*shape, dtype=dtype, device=device), random(*shape, dtype=dtype, device=device), torch.ones(shape[1])
    y, mean, variance = call(x, bias.to(device), residual, "silu")
    assert (y.shape, y.dtype, mean.shape, mean.dtype, variance.shape) == (shape, dtype, shape[1:2], torch.float32, shape[1:2])
    assert mean.isnan().all()
    assert variance.isnan().all()
    for gradient in torch.autograd.grad(y.sum() + mean.sum() + variance.sum(), (x, residual)):
        assert (gradient.shape, gradient.dtype) == (shape, dtype)
    assert bias_act(x, bias.to(device), activation="relu").shape == shape


@pytest.mark.parallel
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_are_bitwise_reproducible_for_any_number_of_threads(fused: Backend, device: torch.device, layout: str) -> None:
    x, residual = (random(2, 5, 33, 31, layout=layout, device=device) for _ in range(2))
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(differentiated(call(x, torch.ones(5, device=device), residual, "silu"), [x, residual]))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("moments", [False, True])
def test_the_reference_has_first_and_second_derivatives(moments: bool) -> None:
    x, residual = random(3, 2, 2, 3, dtype=torch.float64), random(3, 2, 2, 3, dtype=torch.float64)
    bias = torch.ones(2)

    def function(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        return call(x, bias, residual, "silu", moments)

    assert torch.autograd.gradcheck(function, (x, residual))
    assert torch.autograd.gradgradcheck(function, (x, residual))


@pytest.mark.parametrize("moments", [False, True])
def test_double_backward_through_a_kernel_raises(fused: Backend, device: torch.device, moments: bool) -> None:
    x = random(3, 4, 5, 3, device=device)
    results = call(x, torch.ones(4, device=device), None, "silu", moments)
    (gradient,) = torch.autograd.grad(results[-1].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r'no second derivative.*use_backend\("reference"\)'):
        gradient.sum().backward()


def test_without_activation_and_moments_nothing_is_kept_for_the_backward_pass(fused: Backend, device: torch.device) -> None:
    x, residual = (torch.randn(2, 3, 4, 4, device=device, requires_grad=True) for _ in range(2))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):  # type: ignore[func-returns-value]
        y = bias_act(x, torch.ones(3, device=device), residual, activation="none")
    assert kept == []
    for gradient in torch.autograd.grad(y, (x, residual), torch.full_like(y, 2.0)):
        assert (gradient == 2.0).all()
