import shutil
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dfkd_fast.kernels import Backend, batch_norm_act, batch_norm_leaky_relu, dispatch, norm, use_backend
from dfkd_fast.kernels.norm import NormActivation
from tests.kernels.oracles import HALVES, KERNEL_DTYPES, LAYOUTS, PROPERTY, RUNS, assert_as_accurate_as_pytorch, layouts, with_layout

EPS, MOMENTUM, SLOPE = 1e-3, 0.3, 0.2
CPU = torch.device("cpu")
PARAMETERS, STATISTICS = ("weight", "bias"), ("running_mean", "running_var")
Parameters = Mapping[str, Tensor | None]

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def small_tensors_use_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.MIN_NUMEL, "batch_norm_act", 0)


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


def call(
    x: Tensor, parameters: Parameters, residual: Tensor | None = None, *, activation: NormActivation = "leaky_relu", **changed: Any
) -> Tensor:
    kwargs: Any = {**parameters, "training": True, "momentum": MOMENTUM, "eps": EPS, "negative_slope": SLOPE} | changed
    return batch_norm_act(x, residual=residual, activation=activation, **kwargs)


def activated(u: Tensor, activation: str, slope: float = SLOPE) -> Tensor:
    functions: dict[str, Any] = {"none": lambda u: u, "relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}
    return F.leaky_relu(u, slope) if activation == "leaky_relu" else functions[activation](u)


def oracle(
    x: Tensor, parameters: Parameters, residual: Tensor | None = None, *, activation: str = "leaky_relu", **changed: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Plain PyTorch in the precision of x; returns the output and the parameters with updated running statistics."""
    kwargs: Any = {"training": True, "momentum": MOMENTUM, "eps": EPS, "negative_slope": SLOPE} | changed
    copies = {
        name: tensor.detach().to(x.dtype, copy=True).requires_grad_(tensor.requires_grad)
        for name, tensor in parameters.items()
        if tensor is not None
    }
    constants: Any = {name: copies.get(name) for name in (*STATISTICS, *PARAMETERS)}
    bias = copies["input_bias"][:, None, None] if "input_bias" in copies else 0.0
    u = F.batch_norm(x + bias, **constants, training=kwargs["training"], momentum=kwargs["momentum"], eps=EPS)
    return activated(u if residual is None else u + residual.to(x.dtype), activation, kwargs["negative_slope"]), copies


def kinks(activation: str) -> tuple[float, ...]:
    return {"none": (), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0), "silu": ()}.get(activation, (0.0,))


def check(
    x: Tensor,
    gradient: Tensor,
    parameters: Parameters,
    residual: Tensor | None = None,
    *,
    activation: NormActivation = "leaky_relu",
    **changed: Any,
) -> None:
    """Compare output, running statistics and all gradients with float64, relative to the error of plain PyTorch."""
    affine = {name: parameter for name in (*PARAMETERS, "input_bias") if (parameter := parameters.get(name)) is not None}
    plain_x, exact_x = (x.detach().to(dtype).requires_grad_() for dtype in (torch.float32, torch.float64))
    residuals = (
        [None] * 3
        if residual is None
        else [residual, *(residual.detach().to(each).requires_grad_() for each in (torch.float32, torch.float64))]
    )
    plain, of_plain = oracle(plain_x, parameters, residuals[1], activation=activation, **changed)
    exact, of_exact = oracle(exact_x, parameters, residuals[2], activation=activation, **changed)
    argument = oracle(exact_x, parameters, residuals[2], activation="none", **changed)[0].detach()
    # Near a kink, rounding decides on which side of it the input of the activation is.
    margin = 1e-4 if residual is None or x.dtype == torch.float32 else 0.05
    for kink in kinks(activation):
        gradient = gradient.masked_fill((argument - kink).abs() < margin, 0)
    y = call(x, parameters, residual, activation=activation, **changed)
    leaves = [x, *affine.values(), *([] if residual is None else [residual])]
    gradients = torch.autograd.grad(y, leaves, gradient)
    for tensor in (y, gradients[0]):
        assert tensor.dtype == x.dtype
        assert tensor.stride() == torch.empty_like(x).stride()
    # Magnitudes of terms that may cancel: x · scale and shift, the same in the gradient, and the sums over rows.
    slope = changed.get("negative_slope", SLOPE) if activation == "leaky_relu" else 1.2
    size, inverse = x.detach().abs().max().item(), (exact_x.var(dim=(0, 2, 3), correction=0) + EPS).rsqrt().max().item()
    gain = 1.0 if parameters["weight"] is None else parameters["weight"].detach().abs().max().item()
    upstream, count = gradient.abs().max().item() * max(slope, 1), x.numel() // x.shape[1]
    assert_as_accurate_as_pytorch(y, plain.to(x.dtype), exact, magnitude=gain * inverse * size * max(slope, 1))
    for name in STATISTICS:
        if (statistic := parameters[name]) is not None:
            assert_as_accurate_as_pytorch(statistic, of_plain[name], of_exact[name], magnitude=size)
    plain_leaves, exact_leaves = (
        [first, *(copies[name] for name in affine), *([] if last is None else [last])]
        for first, copies, last in ((plain_x, of_plain, residuals[1]), (exact_x, of_exact, residuals[2]))
    )
    plain_gradients = torch.autograd.grad(plain, plain_leaves, gradient.float())
    exact_gradients = torch.autograd.grad(exact, exact_leaves, gradient.double())
    magnitude = gain * inverse * upstream * (1 + inverse * size)
    assert_as_accurate_as_pytorch(gradients[0], plain_gradients[0].to(x.dtype), exact_gradients[0], magnitude=magnitude)
    for index in range(1, 1 + len(affine)):
        magnitude = count * upstream * (1 + inverse * size) * max(1, gain * inverse)
        assert_as_accurate_as_pytorch(gradients[index], plain_gradients[index], exact_gradients[index], magnitude=magnitude)
    if residual is not None:
        assert_as_accurate_as_pytorch(gradients[-1], plain_gradients[-1].to(x.dtype), exact_gradients[-1], magnitude=upstream)


SHAPES = [(2, 3, 5, 7), (1, 1, 2, 1), (3, 70, 4, 4), (5, 64, 9, 1), (300, 8, 3, 5), (3, 5, 61, 59), (2, 365, 3, 3)]


def backend_of(x: Tensor, parameters: Parameters) -> str:
    return norm._backend(x, dict(parameters), 1)


def like(x: Tensor) -> Tensor:
    """A residual with the layout and dtype of x."""
    torch.manual_seed(2)
    return torch.randn(x.shape).to(torch.empty_like(x)).detach().requires_grad_()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_values_gradients_and_statistics_match_float64(
    fused: Backend, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x, gradient, parameters = case(shape, dtype, device=device)
    assert backend_of(x, parameters) == fused
    check(x, gradient, parameters)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", get_args(NormActivation))
def test_every_activation_with_and_without_residual_in_training_and_evaluation(
    fused: Backend, device: torch.device, activation: NormActivation, layout: str, training: bool, with_residual: bool
) -> None:
    x, gradient, parameters = case((5, 24, 4, 6), layout=layout, device=device)
    check(x, gradient, parameters, like(x) if with_residual else None, activation=activation, training=training)


@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu", "relu6"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_residual_in_half_precision_is_added_before_rounding(
    fused: Backend, device: torch.device, dtype: torch.dtype, activation: NormActivation
) -> None:
    x, gradient, parameters = case((5, 24, 4, 6), dtype, device=device)
    check(x, gradient, parameters, like(x), activation=activation)


@pytest.mark.parametrize("shape", [(4, 5, 3, 7), (3, 70, 2, 3), *RUNS], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_every_layout_is_supported(fused: Backend, device: torch.device, dtype: torch.dtype, layout: str, shape: tuple[int, ...]) -> None:
    x, gradient, parameters = case(shape, dtype, layout=layout, device=device)
    assert backend_of(x, parameters) == fused
    check(x, gradient, parameters, like(x), activation="relu")


@settings(PROPERTY, max_examples=min(PROPERTY.max_examples, 30))  # Triton's interpreter takes two seconds for each
@given(data=st.data(), dtype=st.sampled_from(KERNEL_DTYPES), activation=st.sampled_from(["none", "relu", "leaky_relu", "relu6"]))
def test_activations_gradients_and_residuals_may_have_any_strides(
    fused: Backend, device: torch.device, data: st.DataObject, dtype: torch.dtype, activation: NormActivation
) -> None:
    channels = data.draw(st.one_of(st.integers(1, 20), st.integers(60, 140)))
    shape = (data.draw(st.integers(2, 4)), channels, data.draw(st.integers(1, 7)), data.draw(st.integers(2, 9)))
    x, gradient, parameters = case(shape, dtype, device=device)
    x, residual = (data.draw(layouts(4))(values.detach()).requires_grad_() for values in (x, like(x)))
    check(x, data.draw(layouts(4))(gradient), parameters, data.draw(st.sampled_from([residual, None])), activation=activation)


@pytest.mark.parametrize("slope", [0, 0.2, 1, 3.5])
@pytest.mark.parametrize("present", [(), ("weight",), ("bias",), PARAMETERS], ids=str)
def test_slopes_and_optional_parameters(fused: Backend, device: torch.device, present: tuple[str, ...], slope: float) -> None:
    x, gradient, parameters = case((4, 6, 5, 3), device=device)
    chosen = {name: tensor if name in (*present, *STATISTICS) else None for name, tensor in parameters.items()}
    check(x, gradient, chosen, negative_slope=slope)


@pytest.mark.parametrize("training", [True, False])
def test_an_input_bias_changes_the_running_mean_only(fused: Backend, device: torch.device, training: bool) -> None:
    x, gradient, parameters = case((4, 6, 5, 3), device=device)
    parameters["input_bias"] = torch.randn(6).to(device).requires_grad_()
    copies = {name: tensor.detach().clone() for name, tensor in parameters.items()}
    if training:
        without = call(x, {name: tensor for name, tensor in copies.items() if name != "input_bias"})
        y = call(x, copies | {"input_bias": parameters["input_bias"]})
        assert torch.equal(y, without)
        (of_bias,) = torch.autograd.grad(y, [parameters["input_bias"]], gradient)
        assert torch.equal(of_bias, torch.zeros_like(of_bias))
        del copies
    check(x, gradient, parameters, activation="silu", training=training)


def test_without_running_statistics_those_of_the_batch_are_used(fused: Backend, device: torch.device) -> None:
    x, gradient, parameters = case((4, 6, 5, 3), device=device)
    check(x, gradient, {**parameters, "running_mean": None, "running_var": None})
    with pytest.raises(ValueError, match="running_mean and running_var are required unless training is True"):
        call(x, {**parameters, "running_mean": None, "running_var": None}, training=False)
    with pytest.raises(ValueError, match="running_mean and running_var must be given together"):
        call(x, {**parameters, "running_mean": None})


@pytest.mark.parametrize("momentum", [None, 0.25])
def test_the_average_over_all_batches_and_their_number_are_those_of_pytorch(
    backend: Backend, device: torch.device, momentum: float | None
) -> None:
    layer = torch.nn.BatchNorm2d(6, momentum=momentum, device=device)
    mean, variance, batches = (tensor.clone() for tensor in layer.buffers())
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(4, 6, 5, 3).to(device)
        layer(x)
        keywords: Any = {"training": True, "momentum": momentum, "eps": layer.eps, "activation": "none"}
        batch_norm_act(x, mean, variance, None, None, num_batches_tracked=batches, **keywords)
        for actual, expected in zip((mean, variance, batches), layer.buffers(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    batch_norm_act(x, mean, variance, None, None, num_batches_tracked=batches, **keywords | {"training": False})
    assert batches.item() == 3


def test_an_activation_changes_what_is_normalized_only(fused: Backend, device: torch.device) -> None:
    x, gradient, parameters = case((4, 6, 5, 3), device=device)
    leaves = x, parameters["weight"], parameters["bias"]
    normalized = call(x, parameters, activation="none")
    assert (normalized < 0).any()
    leaky = call(x, parameters, negative_slope=0.5)
    assert torch.equal(leaky, torch.where(normalized > 0, normalized, normalized * 0.5))
    before = torch.where(normalized > 0, gradient, gradient * 0.5)
    for one, other in zip(torch.autograd.grad(leaky, leaves, gradient), torch.autograd.grad(normalized, leaves, before), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "relu6"])
def test_with_a_residual_nothing_is_stored_but_input_and_result(fused: Backend, device: torch.device, activation: NormActivation) -> None:
    x, _, parameters = case((4, 6, 5, 3), device=device)
    stored: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() == x.numel():
            stored.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call(x, parameters, like(x), activation=activation)
        assert stored == {x.data_ptr(), y.data_ptr()}
        stored.clear()
        call(x, parameters, activation=activation)
        assert stored == {x.data_ptr()}


def test_results_are_accurate_for_a_large_mean(fused: Backend, device: torch.device) -> None:
    deviations, gradient, parameters = case((64, 4, 8, 8), device=device)
    half = (deviations.detach()[:32] * 64).round() / 64
    x = (torch.cat([half, -half]) + 3000).requires_grad_()  # with a mean that is exact in float32
    gradient += 1  # whose products with x add up to 3000 times the result
    exact_x = x.detach().double().requires_grad_()
    expected, wide = oracle(exact_x, parameters, activation="none")
    y = call(x, parameters, activation="none")
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(y, [x, *(parameters[name] for name in PARAMETERS)], gradient)
    exact = torch.autograd.grad(expected, [exact_x, *(wide[name] for name in PARAMETERS)], gradient.double())
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=1e-5)
    for actual, expected_gradient in zip(ours[1:], exact[1:], strict=True):
        torch.testing.assert_close(actual.double(), expected_gradient, rtol=1e-5, atol=1e-3)


@pytest.mark.parallel
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_are_bitwise_reproducible_for_any_number_of_threads(fused: Backend, device: torch.device, layout: str) -> None:
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
def test_nonfinite_values_propagate_within_a_channel(fused: Backend, device: torch.device, value: float) -> None:
    x, gradient, parameters = case((3, 4, 5, 3), device=device)
    with torch.no_grad():
        x[1, 2, 3, 1] = value
    y = call(x, parameters)
    gradients = torch.autograd.grad(y, (x, parameters["weight"], parameters["bias"]), gradient)
    others = [0, 1, 3]
    assert y[:, 2].isnan().all() and y[:, others].isfinite().all()
    assert gradients[0][:, 2].isnan().all() and gradients[0][:, others].isfinite().all()
    assert all(tensor[others].isfinite().all() for tensor in gradients[1:])


@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu", "relu6", "hardswish"])
def test_infinite_values_in_evaluation_are_those_of_pytorch(fused: Backend, device: torch.device, activation: NormActivation) -> None:
    x, _, parameters = case((2, 6, 3, 3), device=device)
    with torch.no_grad():
        x[0, :, 0, 0], x[1, :, 2, 1] = float("inf"), float("-inf")
        expected, _ = oracle(x.detach().double(), parameters, activation=activation, training=False)
        for residual in (None, torch.zeros_like(x)):
            y = call(x, parameters, residual, activation=activation, training=False)
            torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    y = call(x, parameters, activation=activation, training=False)
    assert torch.autograd.grad(y, x, torch.ones_like(y))[0].isfinite().all()


def test_evaluation_does_not_change_running_statistics(fused: Backend, device: torch.device) -> None:
    x, _, parameters = case((2, 6, 3, 3), device=device)
    before = {name: tensor.clone() for name, tensor in parameters.items()}
    with torch.no_grad():
        assert backend_of(x, parameters) == fused
        call(x, parameters, training=False)
    for name, tensor in parameters.items():
        assert torch.equal(tensor, before[name]), name


def test_running_statistics_that_autograd_has_saved_are_marked_as_changed(fused: Backend, device: torch.device) -> None:
    x, _, parameters = case((2, 6, 3, 3), device=device)
    loss = (parameters["running_mean"] * torch.ones(6, device=device, requires_grad=True)).sum()
    call(x, parameters)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_statistics_created_in_inference_mode_are_updated(fused: Backend, device: torch.device) -> None:
    with torch.inference_mode():
        x, _, parameters = case((2, 6, 3, 3), device=device)
        before = parameters["running_mean"].clone()
        call(x, parameters)
        assert not torch.equal(parameters["running_mean"], before)


@pytest.mark.parametrize("momentum", [MOMENTUM, None])
@pytest.mark.parametrize("training", [True, False])
def test_compiled_code_calls_the_kernels_and_updates_statistics_once(
    fused: Backend, device: torch.device, training: bool, momentum: float | None
) -> None:
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        x, gradient, parameters = case((2, 6, 3, 3), device=device)
        count = torch.tensor(3, device=device)
        function: Callable[..., Tensor] = partial(call, training=training, momentum=momentum, num_batches_tracked=count, activation="relu")
        if compiled:
            function = torch.compile(function, fullgraph=True, backend="aot_eager")
            with torch.profiler.profile() as profiler:
                y = function(x, parameters, x)
            assert f"dfkd_fast::batch_norm_{'statistics' if training else 'constants'}" in {event.key for event in profiler.key_averages()}
        else:
            y = function(x, parameters, x)
        leaves = [x, *(parameters[name] for name in PARAMETERS)]
        results.append([y, *torch.autograd.grad(y, leaves, gradient), count, *(parameters[name] for name in STATISTICS)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_compiles_batch_norms_with_and_without_running_statistics() -> None:
    x, _, parameters = case((2, 6, 3, 3))
    with use_backend("numba"):
        for statistics in ({}, dict.fromkeys(STATISTICS)):
            torch.compiler.reset()
            function = partial(call, x, {**parameters, **statistics}, activation="relu")
            torch.testing.assert_close(torch.compile(function, fullgraph=True)(), function(), rtol=1e-5, atol=1e-5)


def test_unsupported_calls_use_pytorch(fused: Backend, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "_normalized", None)
    x, _, parameters = case((2, 6, 3, 3), device=device)
    other = x.detach().double()
    statistics = {name: tensor.double() for name, tensor in parameters.items()}
    expected, _ = oracle(other, statistics)
    torch.testing.assert_close(call(other, statistics), expected, rtol=1e-5, atol=1e-5)
    with use_backend("reference"):
        assert backend_of(x, parameters) == "reference"
        weight, bias = parameters["weight"], parameters["bias"]
        y = call(x, parameters, activation="none")
        assert torch.equal(y, F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS))


@pytest.mark.skipif(dispatch.unavailable_reason("numba") is not None, reason="numba is not installed")
def test_small_cpu_tensors_use_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, parameters = case((2, 6, 3, 3))
    with use_backend(None):
        assert backend_of(x, parameters) == "numba"
        monkeypatch.setitem(dispatch.MIN_NUMEL, "batch_norm_act", x.numel() + 1)
        assert backend_of(x, parameters) == "reference"


@pytest.mark.parametrize("name", [*STATISTICS, *PARAMETERS])
def test_invalid_shapes_are_named(name: str) -> None:
    x, _, parameters = case((2, 6, 3, 3))
    with pytest.raises(ValueError, match=name):
        call(x, {**parameters, name: torch.ones(1)})
    with pytest.raises(ValueError, match="x must be"):
        call(x[0], parameters)


def test_one_value_per_channel_raises_in_training(fused: Backend, device: torch.device) -> None:
    x, _, parameters = case((1, 6, 1, 1), device=device)
    with pytest.raises(ValueError, match="more than 1 value"):
        call(x, parameters)


def test_the_earlier_name_works_with_a_warning() -> None:
    x, _, parameters = case((2, 6, 3, 3))
    expected = call(x, {name: tensor.detach().clone() for name, tensor in parameters.items()})
    with pytest.warns(FutureWarning, match="batch_norm_leaky_relu is now batch_norm_act with activation='leaky_relu'"):
        y = batch_norm_leaky_relu(x, **parameters, training=True, momentum=MOMENTUM, eps=EPS, negative_slope=SLOPE)
    assert torch.equal(y, expected)
