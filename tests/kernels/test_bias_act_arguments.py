"""Unusual arguments of bias_act: correct results, or an error that names the argument."""

from typing import Any

import pytest
import torch

from dfkd_fast.kernels import Backend, bias_act
from tests.kernels import oracles

X, BIAS = torch.zeros(2, 3, 4, 5), torch.zeros(3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 3)}, r"x must be \(N, C, H, W\), not \(2, 3\)"),
        ({"x": X.int()}, r"x must have a floating-point dtype, not torch\.int32"),
        ({"x": X * 1j}, r"x must have a floating-point dtype, not torch\.complex64"),
        ({"x": X.to_sparse()}, r"x must have the layout torch\.strided, not torch\.sparse_coo"),
        ({"bias": torch.zeros(4)}, r"bias must be \(3,\), not \(4,\)"),
        ({"bias": torch.zeros(3, 1)}, r"bias must be \(3,\), not \(3, 1\)"),
        ({"bias": BIAS.long()}, r"bias must have a floating-point dtype, not torch\.int64"),
        ({"bias": BIAS.to("meta")}, "bias must be on the device of x, cpu, not on meta"),
        ({"bias": torch.zeros(3, requires_grad=True)}, r"bias requires grad, .*: pass bias\.detach\(\)"),
        ({"residual": X[:, :1]}, r"residual must be torch\.float32 \(2, 3, 4, 5\), as x, not torch\.float32 \(2, 1, 4, 5\)"),
        ({"residual": X.half()}, r"residual must be torch\.float32 \(2, 3, 4, 5\), as x, not torch\.float16 \(2, 3, 4, 5\)"),
        ({"residual": X.to("meta")}, "residual must be on the device of x, cpu, not on meta"),
        ({"residual": X.to_sparse()}, r"residual must have the layout torch\.strided, not torch\.sparse_coo"),
        ({"activation": "tanh"}, "activation must be one of none, relu, relu6, silu, hardswish, not 'tanh'"),
    ],
)
def test_invalid_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    arguments: Any = {"x": X, "bias": BIAS, "residual": None, "activation": "relu"} | changes
    with pytest.raises(ValueError, match=f"^{message}$"):
        bias_act(**arguments)


def test_a_bias_that_requires_grad_is_accepted_without_autograd(backend: Backend, device: torch.device) -> None:
    x, bias = torch.randn(2, 3, 4, 5).to(device), torch.ones(3, device=device, requires_grad=True)
    with torch.no_grad():
        torch.testing.assert_close(bias_act(x, bias, activation="none"), x + 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_bias_may_have_another_dtype_and_any_stride(backend: Backend, device: torch.device, dtype: torch.dtype) -> None:
    x, bias = torch.randn(2, 3, 4, 5).to(device), torch.randn(6).to(device, dtype)[::2]
    y = bias_act(x, bias, activation="none")
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, x + bias.float()[:, None, None])


def test_float64_is_computed_in_float64() -> None:
    x, bias = torch.randn(200, 3, 40, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    y, mean, variance = oracles.bias_act_moments(x, bias, x, "none")
    torch.testing.assert_close(y, 2 * x + bias[:, None, None], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close((mean, variance), oracles.moments(x + bias[:, None, None]), rtol=1e-12, atol=1e-12)


def test_negative_bits_are_resolved(backend: Backend, device: torch.device) -> None:
    x, bias, residual = torch.randn(2, 3, 4, 5).to(device), torch.randn(3).to(device), torch.randn(2, 3, 4, 5).to(device)
    negative_x, negative_residual = (torch._neg_view(tensor).detach().requires_grad_() for tensor in (x, residual))
    y, mean, _ = oracles.bias_act_moments(negative_x, torch._neg_view(bias), negative_residual, "relu")
    torch.testing.assert_close(y, (-x - bias[:, None, None] - residual).relu())
    torch.testing.assert_close(mean, oracles.moments(-x - bias[:, None, None])[0])
    for gradient in torch.autograd.grad(y, (negative_x, negative_residual), torch._neg_view(torch.ones_like(y))):
        torch.testing.assert_close(gradient, -(y > 0).float())


def test_double_backward_that_would_lack_a_term_raises(fused: Backend, device: torch.device) -> None:
    x = oracles.random(3, 4, 5, 3, device=device)
    (gradient,) = torch.autograd.grad(bias_act(x, torch.ones(4, device=device), activation="silu").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="bias_act: its kernels have no second derivative"):
        torch.autograd.grad((gradient + x).sum(), x)
