from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_fast.kernels import batch_norm_leaky_relu, dispatch, norm, use_backend

EPS, MOMENTUM, SLOPE = 1e-3, 0.3, 0.2


@pytest.fixture(autouse=True)
def small_tensors_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.WORTHWHILE, "batch_norm_leaky_relu", 0)


def case(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, *, offset: float = 0.5) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    x = (torch.randn(shape) * 2 + offset).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)
    channels = shape[1]
    parameters = {
        "weight": torch.randn(channels).requires_grad_(),
        "bias": torch.randn(channels).requires_grad_(),
        "running_mean": torch.randn(channels),
        "running_var": torch.rand(channels) + 0.5,
    }
    return x, gradient, parameters


def call(x: Tensor, parameters: dict[str, Tensor | None], *, training: bool = True) -> Tensor:
    given: dict[str, Any] = parameters
    return batch_norm_leaky_relu(x, **given, training=training, momentum=MOMENTUM, eps=EPS, negative_slope=SLOPE)


def oracle(x: Tensor, parameters: dict[str, Tensor], *, training: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """In float64, and the running statistics after it."""
    wide = {name: tensor.detach().double().requires_grad_(tensor.requires_grad) for name, tensor in parameters.items()}
    given: dict[str, Any] = wide
    normalised = F.batch_norm(x, **given, training=training, momentum=MOMENTUM, eps=EPS)
    return F.leaky_relu(normalised, SLOPE), wide


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 2, 1), (3, 70, 4, 4), (5, 64, 9, 1), (300, 8, 3, 5)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "relative", "absolute"), [(torch.float32, 1e-5, 1e-4), (torch.bfloat16, 0.02, 0.02), (torch.float16, 0.02, 0.02)], ids=str
)
def test_values_gradients_and_statistics_are_those_of_float64(
    shape: tuple[int, ...], dtype: torch.dtype, relative: float, absolute: float
) -> None:
    x, gradient, parameters = case(shape, dtype)
    exact = x.detach().double().requires_grad_()
    expected, wide = oracle(exact, parameters)
    # Where the ReLU's argument is nearly 0, rounding decides on which side.
    decided = torch.where(expected > 0, expected, expected / SLOPE).detach().abs() > 0.02
    gradient = gradient * decided.to(dtype)
    expected.backward(gradient.double())
    assert norm._served(x, True)
    y = call(x, dict(parameters))
    y.backward(gradient)
    close = partial(torch.testing.assert_close, rtol=relative, atol=absolute)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    close(y.double(), expected)
    assert x.grad is not None and exact.grad is not None
    close(x.grad.double(), exact.grad)
    for name in ("weight", "bias"):
        torch.testing.assert_close(parameters[name].grad.double(), wide[name].grad, rtol=1e-4, atol=1e-3)  # type: ignore[union-attr]
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(parameters[name].double(), wide[name], rtol=1e-5, atol=1e-5)


def test_a_mean_far_from_zero_costs_no_digits_of_the_variance() -> None:
    x, _, parameters = case((64, 4, 8, 8), offset=300.0)
    expected, _ = oracle(x.detach().double(), parameters)
    torch.testing.assert_close(call(x, dict(parameters)).double(), expected, rtol=1e-3, atol=1e-3)


def test_evaluation_normalises_by_the_running_statistics_and_leaves_them() -> None:
    x, _, parameters = case((2, 6, 3, 3))
    before = {name: tensor.clone() for name, tensor in parameters.items()}
    with torch.no_grad():
        assert norm._served(x, False)
        y = call(x, dict(parameters), training=False)
    expected, _ = oracle(x.detach().double(), parameters, training=False)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for name, tensor in parameters.items():
        assert torch.equal(tensor, before[name]), name


def test_no_gain_and_no_offset_are_one_and_zero() -> None:
    x, gradient, parameters = case((2, 6, 3, 3))
    plain = dict(parameters) | {"weight": None, "bias": None}
    y = call(x, plain)
    expected = F.leaky_relu(F.batch_norm(x, torch.zeros(6), torch.zeros(6), training=True, eps=EPS), SLOPE)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(z, x, gradient)[0] for z in (y, expected)), rtol=1e-4, atol=1e-4)


def test_what_the_kernels_do_not_serve_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm._Fused, "apply", None)
    x, _, parameters = case((2, 6, 3, 3))
    tiny = x.detach()
    others = [tiny.contiguous(), tiny.double()]
    for other in others:
        statistics = {name: tensor.to(other.dtype) for name, tensor in parameters.items()}
        expected, _ = oracle(other.double(), statistics)
        torch.testing.assert_close(call(other, dict(statistics)).double(), expected, rtol=1e-5, atol=1e-5)
    with use_backend("reference"):
        assert not norm._served(x, True)
    monkeypatch.setitem(dispatch.WORTHWHILE, "batch_norm_leaky_relu", x.numel() + 1)
    assert not norm._served(x, True)


def test_frozen_generators_in_evaluation_still_pass_gradients_on() -> None:
    x, gradient, parameters = case((2, 6, 3, 3))
    exact = x.detach().double().requires_grad_()
    expected, _ = oracle(exact, parameters, training=False)
    expected.backward(gradient.double())
    call(x, dict(parameters), training=False).backward(gradient)
    assert x.grad is not None and exact.grad is not None
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
def test_shapes_that_do_not_fit_are_named(name: str) -> None:
    x, _, parameters = case((2, 6, 3, 3))
    wrong: dict[str, Tensor | None] = {**parameters, name: torch.ones(1)}
    with pytest.raises(ValueError, match=name):
        call(x, wrong)
    with pytest.raises(ValueError, match="x must be"):
        call(x[0], dict(parameters))


def test_one_value_a_channel_has_no_moments() -> None:
    x, _, parameters = case((1, 6, 1, 1))
    with pytest.raises(ValueError, match="more than 1 value"):
        call(x, dict(parameters))
