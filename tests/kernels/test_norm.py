from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dfkd_fast.kernels import Backend, batch_norm_leaky_relu, dispatch, norm, use_backend
from tests.kernels.oracles import KERNEL_DTYPES, LAYOUTS, PROPERTY, RUNS, assert_as_accurate_as_pytorch, layouts, with_layout

EPS, MOMENTUM, SLOPE = 1e-3, 0.3, 0.2
CPU = torch.device("cpu")
PARAMETERS, STATISTICS = ("weight", "bias"), ("running_mean", "running_var")
Parameters = Mapping[str, Tensor | None]

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def small_tensors_use_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.MIN_NUMEL, "batch_norm_leaky_relu", 0)


def case(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    offset: float = 0.5,
    layout: str = "channels_last",
    device: torch.device = CPU,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    x, gradient = (with_layout(values.to(device, dtype), layout) for values in (torch.randn(shape) * 2 + offset, torch.randn(shape)))
    parameters = {name: torch.randn(shape[1]).to(device).requires_grad_(name in PARAMETERS) for name in (*PARAMETERS, *STATISTICS)}
    parameters["running_var"].abs_().add_(0.5)
    return x.detach().requires_grad_(), gradient, parameters


def call(x: Tensor, parameters: Parameters, *, training: bool = True, slope: float = SLOPE) -> Tensor:
    kwargs: Any = parameters
    return batch_norm_leaky_relu(x, **kwargs, training=training, momentum=MOMENTUM, eps=EPS, negative_slope=slope)


def oracle(x: Tensor, parameters: Parameters, *, training: bool = True, slope: float = SLOPE) -> tuple[Tensor, dict[str, Tensor]]:
    """Plain PyTorch in the precision of x; returns the output and the parameters with updated running statistics."""
    copies = {
        name: tensor.detach().to(x.dtype, copy=True).requires_grad_(tensor.requires_grad)
        for name, tensor in parameters.items()
        if tensor is not None
    }
    kwargs: Any = {name: copies.get(name) for name in parameters}
    normalized = F.batch_norm(x, **kwargs, training=training, momentum=MOMENTUM, eps=EPS)
    return F.leaky_relu(normalized, slope), copies


def check(x: Tensor, gradient: Tensor, parameters: Parameters, slope: float = SLOPE) -> None:
    """Compare output, running statistics and all gradients with float64, relative to the error of plain PyTorch."""
    affine = {name: parameter for name in PARAMETERS if (parameter := parameters[name]) is not None}
    plain_x, exact_x = (x.detach().to(dtype).requires_grad_() for dtype in (torch.float32, torch.float64))
    plain, of_plain = oracle(plain_x, parameters, slope=slope)
    exact, of_exact = oracle(exact_x, parameters, slope=slope)
    if slope != 1:  # near 0, rounding decides the sign of the input of the ReLU
        argument, _ = oracle(exact_x, parameters, slope=1)
        gradient = gradient.masked_fill(argument.detach().abs() < 1e-4, 0)
    y = call(x, parameters, slope=slope)
    gradients = torch.autograd.grad(y, [x, *affine.values()], gradient)
    for tensor in (y, gradients[0]):
        assert tensor.dtype == x.dtype
        assert tensor.stride() == torch.empty_like(x).stride()
    # Magnitudes of terms that may cancel: x · scale and shift, the same in the gradient, and the sums over rows.
    size, inverse = x.detach().abs().max().item(), (exact_x.var(dim=(0, 2, 3), correction=0) + EPS).rsqrt().max().item()
    gain = 1.0 if parameters["weight"] is None else parameters["weight"].detach().abs().max().item()
    upstream, count = gradient.abs().max().item() * max(slope, 1), x.numel() // x.shape[1]
    assert_as_accurate_as_pytorch(y, plain.to(x.dtype), exact, magnitude=gain * inverse * size * max(slope, 1))
    for name in STATISTICS:
        assert_as_accurate_as_pytorch(parameters[name], of_plain[name], of_exact[name], magnitude=size)  # type: ignore[arg-type]
    plain_gradients = torch.autograd.grad(plain, [plain_x, *(of_plain[name] for name in affine)], gradient.float())
    exact_gradients = torch.autograd.grad(exact, [exact_x, *(of_exact[name] for name in affine)], gradient.double())
    assert_as_accurate_as_pytorch(
        gradients[0], plain_gradients[0].to(x.dtype), exact_gradients[0], magnitude=gain * inverse * upstream * (1 + inverse * size)
    )
    for actual, of_float32, expected in zip(gradients[1:], plain_gradients[1:], exact_gradients[1:], strict=True):
        assert_as_accurate_as_pytorch(actual, of_float32, expected, magnitude=count * upstream * (1 + inverse * size))


SHAPES = [(2, 3, 5, 7), (1, 1, 2, 1), (3, 70, 4, 4), (5, 64, 9, 1), (300, 8, 3, 5), (3, 5, 61, 59), (2, 365, 3, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_values_gradients_and_statistics_match_float64(
    norm_backend: Backend, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x, gradient, parameters = case(shape, dtype, device=device)
    assert norm._backend(x, True) == norm_backend
    check(x, gradient, parameters)


@pytest.mark.parametrize("shape", [(4, 5, 3, 7), (3, 70, 2, 3), *RUNS], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_every_layout_is_supported(triton: Backend, device: torch.device, dtype: torch.dtype, layout: str, shape: tuple[int, ...]) -> None:
    x, gradient, parameters = case(shape, dtype, layout=layout, device=device)
    assert norm._backend(x, True) == triton
    check(x, gradient, parameters)


@PROPERTY
@given(data=st.data(), dtype=st.sampled_from(KERNEL_DTYPES), slope=st.sampled_from([0.0, 0.2, 1.0, 2.0]))
def test_activation_and_gradient_may_have_any_strides(
    triton: Backend, device: torch.device, data: st.DataObject, dtype: torch.dtype, slope: float
) -> None:
    channels = data.draw(st.one_of(st.integers(1, 20), st.integers(60, 140)))
    shape = (data.draw(st.integers(2, 6)), channels, data.draw(st.integers(1, 12)), data.draw(st.integers(2, 12)))
    x, gradient, parameters = case(shape, dtype, device=device)
    x = data.draw(layouts(4))(x.detach()).requires_grad_()
    check(x, data.draw(layouts(4))(gradient), parameters, slope)


@pytest.mark.parametrize("slope", [0, 0.2, 1, 3.5])
@pytest.mark.parametrize("present", [(), ("weight",), ("bias",), PARAMETERS], ids=str)
def test_slopes_and_optional_parameters(norm_backend: Backend, device: torch.device, present: tuple[str, ...], slope: float) -> None:
    x, gradient, parameters = case((4, 6, 5, 3), device=device)
    check(x, gradient, {name: tensor if name in (*present, *STATISTICS) else None for name, tensor in parameters.items()}, slope)


def test_slope_1_is_batch_norm_alone(norm_backend: Backend, device: torch.device) -> None:
    x, gradient, parameters = case((4, 6, 5, 3), device=device)
    normalized = call(x, parameters, slope=1)
    assert (normalized < 0).any()
    leaky = call(x, parameters, slope=0.5)
    assert torch.equal(leaky, torch.where(normalized > 0, normalized, normalized * 0.5))
    before = torch.where(normalized > 0, gradient, gradient * 0.5)
    for one, other in zip(
        torch.autograd.grad(leaky, (x, parameters["weight"], parameters["bias"]), gradient),
        torch.autograd.grad(normalized, (x, parameters["weight"], parameters["bias"]), before),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_results_are_accurate_for_a_large_mean(norm_backend: Backend, device: torch.device) -> None:
    deviations, gradient, parameters = case((64, 4, 8, 8), device=device)
    half = (deviations.detach()[:32] * 64).round() / 64
    x = (torch.cat([half, -half]) + 3000).requires_grad_()  # with a mean that is exact in float32
    gradient += 1  # whose products with x add up to 3000 times the result
    exact_x = x.detach().double().requires_grad_()
    expected, wide = oracle(exact_x, parameters, slope=1)
    y = call(x, parameters, slope=1)
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-3)
    ours = torch.autograd.grad(y, [x, *(parameters[name] for name in PARAMETERS)], gradient)
    exact = torch.autograd.grad(expected, [exact_x, *(wide[name] for name in PARAMETERS)], gradient.double())
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-3, atol=1e-3)
    for actual, expected_gradient in zip(ours[1:], exact[1:], strict=True):
        torch.testing.assert_close(actual.double(), expected_gradient, rtol=1e-5, atol=1e-3)


@pytest.mark.parallel
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_are_bitwise_reproducible_for_any_number_of_threads(norm_backend: Backend, device: torch.device, layout: str) -> None:
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        x, gradient, parameters = case((5, 7, 61, 59), layout=layout, device=device)
        y = call(x, parameters)
        gradients = torch.autograd.grad(y, (x, parameters["weight"], parameters["bias"]), gradient)
        results.append((y, *gradients, parameters["running_mean"], parameters["running_var"]))
    for again in results[1:]:
        assert all(map(torch.equal, results[0], again))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_values_propagate_within_a_channel(norm_backend: Backend, device: torch.device, value: float) -> None:
    x, gradient, parameters = case((3, 4, 5, 3), device=device)
    with torch.no_grad():
        x[1, 2, 3, 1] = value
    y = call(x, parameters)
    gradients = torch.autograd.grad(y, (x, parameters["weight"], parameters["bias"]), gradient)
    others = [0, 1, 3]
    assert y[:, 2].isnan().all() and y[:, others].isfinite().all()
    assert gradients[0][:, 2].isnan().all() and gradients[0][:, others].isfinite().all()
    assert all(tensor[others].isfinite().all() for tensor in gradients[1:])


@pytest.mark.parametrize("slope", [0.2, 1])
def test_evaluation_uses_running_statistics_without_updating_them(norm_backend: Backend, device: torch.device, slope: float) -> None:
    x, _, parameters = case((2, 6, 3, 3), device=device)
    before = {name: tensor.clone() for name, tensor in parameters.items()}
    with torch.no_grad():
        assert norm._backend(x, False) == norm_backend
        y = call(x, parameters, training=False, slope=slope)
    expected, _ = oracle(x.detach().double(), parameters, training=False, slope=slope)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for name, tensor in parameters.items():
        assert torch.equal(tensor, before[name]), name


def test_unsupported_calls_use_pytorch(norm_backend: Backend, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm._Fused, "apply", None)
    x, _, parameters = case((2, 6, 3, 3), device=device)
    others = [x.detach().double(), *([x.detach().contiguous()] if norm_backend == "numba" else [])]
    for other in others:
        statistics = {name: tensor.to(other.dtype) for name, tensor in parameters.items()}
        expected, _ = oracle(other.double(), statistics)
        torch.testing.assert_close(call(other, statistics).double(), expected, rtol=1e-5, atol=1e-5)
    with use_backend("reference"):
        assert norm._backend(x, True) == "reference"
        weight, bias = parameters["weight"], parameters["bias"]
        assert torch.equal(call(x, parameters, slope=1), F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS))


@pytest.mark.skipif(dispatch.unavailable_reason("numba") is not None, reason="numba is not installed")
def test_small_cpu_tensors_use_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, _ = case((2, 6, 3, 3))
    with use_backend(None):
        assert norm._backend(x, True) == "numba"
        monkeypatch.setitem(dispatch.MIN_NUMEL, "batch_norm_leaky_relu", x.numel() + 1)
        assert norm._backend(x, True) == "reference"


@pytest.mark.gpu
def test_gpu_tensors_of_any_size_use_triton(triton: Backend) -> None:
    x, _, _ = case((2, 6, 3, 3), device=torch.device("cuda"))
    with use_backend(None):
        assert norm._backend(x, True) == triton


def test_gradients_flow_through_evaluation_mode(norm_backend: Backend, device: torch.device) -> None:
    x, gradient, parameters = case((2, 6, 3, 3), device=device)
    exact = x.detach().double().requires_grad_()
    expected, _ = oracle(exact, parameters, training=False)
    expected.backward(gradient.double())
    call(x, parameters, training=False).backward(gradient)
    assert x.grad is not None and exact.grad is not None
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*STATISTICS, *PARAMETERS])
def test_invalid_shapes_are_named(name: str) -> None:
    x, _, parameters = case((2, 6, 3, 3))
    with pytest.raises(ValueError, match=name):
        call(x, {**parameters, name: torch.ones(1)})
    with pytest.raises(ValueError, match="x must be"):
        call(x[0], parameters)


def test_one_value_per_channel_raises_in_training(norm_backend: Backend, device: torch.device) -> None:
    x, _, parameters = case((1, 6, 1, 1), device=device)
    with pytest.raises(ValueError, match="more than 1 value"):
        call(x, parameters)
