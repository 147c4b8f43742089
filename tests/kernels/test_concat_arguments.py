"""``concat_generated`` with unusual outputs, dtypes and constants: correct, or an error that names them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dfkd_fast.kernels import Backend, concat_generated, use_backend

MEAN, STD = torch.tensor([0.5, -0.25, 0.0]), torch.tensor([0.5, 2.0, 0.25])


def batch(**changed: Any) -> Tensor:
    arguments: dict[str, Any] = {"activation": "tanh", "normalize": "none", **changed}
    return concat_generated(arguments.pop("raws", [torch.randn(4, 3, 6, 8)]), **arguments)


def assert_rejected(message: str, **changed: Any) -> None:
    """Assert an error in every CPU backend."""
    backends: tuple[Backend | None, ...] = ("reference", "numba", None)
    for backend in backends:
        with use_backend(backend), pytest.raises(ValueError, match=message):
            batch(**changed)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64], ids=str)
def test_dtypes_must_be_floating_point(dtype: torch.dtype) -> None:
    assert_rejected(f"out_dtype must be a floating-point dtype, not {dtype}", out_dtype=dtype)
    assert_rejected(f"out must have a floating-point dtype, not {dtype}", out=torch.zeros(4, 3, 6, 8, dtype=dtype))
    raws = [torch.zeros(4, 3, 6, 8), torch.zeros(4, 3, 6, 8, dtype=dtype)]
    assert_rejected(rf"raws\[1\] must have a floating-point dtype, not {dtype}", raws=raws)


@pytest.mark.parametrize("rows", [4, 200])
def test_float64_uses_the_reference_in_both_passes(rows: int) -> None:
    raw = torch.randn(rows, 3, 16, 16, requires_grad=True)
    result = batch(raws=[raw], out_dtype=torch.float64)
    assert result.dtype == torch.float64
    (gradient,) = torch.autograd.grad(result.sum(), raw)
    torch.testing.assert_close(gradient, 1 - raw.detach().tanh().square())


@pytest.mark.parametrize(
    "out",
    [torch.zeros(1, 3, 6, 8).expand(4, 3, 6, 8), torch.zeros(999).as_strided((4, 3, 6, 8), (100, 48, 8, 1))],
    ids=["expanded", "overlapping images"],
)
def test_out_that_overlaps_itself_raises(out: Tensor) -> None:
    assert_rejected("out must not overlap itself: strides", out=out)
    assert not out.any()


@pytest.mark.parametrize("activation", ["tanh", "none"])
@pytest.mark.parametrize(("first", "named"), [(2, 0), (0, 0), (5, 0), (8, 1)])
def test_out_that_overlaps_an_input_raises(first: int, named: int, activation: str) -> None:
    memory = torch.randn(20, 3, 6, 8)
    before = memory.clone()
    raws = [memory[first : first + 4], memory[4:8]] if named == 0 else [torch.randn(4, 3, 6, 8), memory[7:11]]
    assert_rejected(rf"out shares memory with raws\[{named}\]", raws=raws, out=memory[:8], activation=activation)
    assert torch.equal(memory, before)


def test_out_may_be_adjacent_to_or_interleaved_with_inputs(backend: Backend, device: torch.device) -> None:
    memory = torch.randn(8, 3, 6, 16, device=device)
    for raw, out in ((memory[..., ::2], memory[..., 1::2]), (memory[4:], memory[:4])):
        expected = raw.tanh()
        batch(raws=[raw], out=out)
        torch.testing.assert_close(out, expected)


def test_out_that_requires_grad_is_written_under_no_grad_only() -> None:
    for out in (torch.zeros(4, 3, 6, 8, requires_grad=True), torch.zeros(4, 3, 6, 8, requires_grad=True) * 1):
        assert_rejected("out is not supported with autograd: call under torch.no_grad", out=out)
        raw = torch.randn(4, 3, 6, 8)
        with torch.no_grad():
            torch.testing.assert_close(batch(raws=[raw], out=out), raw.tanh())


def test_other_memory_formats_raise() -> None:
    assert_rejected(
        "memory_format must be torch.channels_last or torch.contiguous_format, not torch.preserve", memory_format=torch.preserve_format
    )


def running(training: bool, **changed: Any) -> dict[str, Any]:
    return {"normalize": "batch", "training": [training], "running_means": [MEAN.clone()], "running_vars": [STD.clone()], **changed}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["running_means", "running_vars"])
def test_invalid_running_statistics_are_named(name: str, training: bool) -> None:
    for wrong in (torch.ones(1), torch.ones(4), torch.ones(3, 1), torch.tensor(1.0)):
        shape = str(tuple(wrong.shape)).replace("(", r"\(").replace(")", r"\)")
        assert_rejected(rf"{name}\[0\] must be \(3,\), not {shape}", **running(training, **{name: [wrong]}))
    assert_rejected(rf"{name}\[0\] is on meta, the inputs on cpu", **running(training, **{name: [torch.ones(3, device="meta")]}))
    assert_rejected(
        rf"{name}\[0\] must have a floating-point dtype, not torch.int64", **running(training, **{name: [torch.ones(3).long()]})
    )
    assert_rejected(rf"{name}\[0\] must be real, not torch.complex64", **running(training, **{name: [torch.ones(3) * 1j]}))
    assert_rejected(rf"{name}\[0\] requires grad", **running(training, **{name: [torch.ones(3, requires_grad=True)]}))


@pytest.mark.parametrize("name", ["mean", "std"])
def test_invalid_constants_are_named(name: str) -> None:
    dataset = {"normalize": "dataset", "mean": MEAN, "std": STD}
    assert_rejected(f"{name} is on meta, the inputs on cpu", **{**dataset, name: MEAN.to("meta")})
    assert_rejected(f"{name} must be real, not torch.complex64", **{**dataset, name: MEAN * 1j})
    assert_rejected(
        f"{name} requires grad, but the batch is differentiable with respect to raws only: pass {name}.detach",
        **{**dataset, name: (MEAN + 1).requires_grad_()},
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"momentum": None}, "momentum must be a number from 0 to 1, not None"),
        ({"momentum": float("nan")}, "momentum must be a number from 0 to 1, not nan"),
        ({"eps": None}, "eps must be greater than 0 in training and at least 0 in evaluation, not None"),
        ({"eps": -1.0}, "eps must be greater than 0 .*, not -1.0"),
        ({"eps": 1j}, "eps must be greater than 0 .*, not 1j"),
        ({"running_vars": [torch.ones(1).expand(3)]}, r"running_vars\[0\] must not overlap itself: strides \(0,\) of shape \(3,\)"),
    ],
    ids=str,
)
def test_invalid_values_of_batch_norms_are_named_and_nothing_is_changed(changed: dict[str, Any], message: str) -> None:
    arguments = running(True, **changed)
    assert_rejected(message, **arguments)
    assert torch.equal(arguments["running_means"][0], MEAN)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"training": ["no"]}, r"training\[0\] must be True or False, not 'no'"),
        ({"training": True}, "training must be a list or tuple of bools, not bool"),
        ({"running_means": 3}, "running_means must be a list or tuple of tensors, not int"),
    ],
    ids=str,
)
def test_invalid_lists_of_batch_norms_are_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}$"):
        batch(raws=[torch.zeros(2, 3, 4, 4)], **running(True) | changed)


@pytest.mark.parametrize("wrong", ["float16", torch.int8, 1, torch.ones(2, 3)], ids=str)
def test_an_invalid_out_dtype_is_named(wrong: Any) -> None:
    assert_rejected("out_dtype must be a floating-point dtype, not ", out_dtype=wrong)


def test_a_single_image_of_any_strides_has_the_right_gradient(backend: Backend, device: torch.device) -> None:
    x = torch.randn(9, 7, 3, device=device).permute(2, 0, 1)[None].requires_grad_()  # the batch stride is 3
    exact = x.detach().double().contiguous().requires_grad_()
    variance, mean = torch.var_mean(exact, dim=(0, 2, 3), correction=0, keepdim=True)
    upstream = torch.randn(x.shape, device=device)
    statistics = {"running_means": [MEAN.to(device)], "running_vars": [STD.to(device)]}
    result = batch(raws=[x], activation="none", **running(True, **statistics))
    (expected,) = torch.autograd.grad((exact - mean) / (variance + 1e-5).sqrt(), exact, upstream.double())
    torch.testing.assert_close(torch.autograd.grad(result, x, upstream)[0].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("raw_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_reference_updates_running_statistics_of_other_dtypes(dtype: torch.dtype, raw_dtype: torch.dtype) -> None:
    raw, mean, variance = torch.randn(5, 3, 4, 4).to(raw_dtype), torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
    for training in (True, False):
        arguments = running(training, running_means=[mean], running_vars=[variance])
        with use_backend("reference"):
            result = batch(raws=[raw], activation="none", **arguments)
        if training:
            torch.testing.assert_close(mean.double(), 0.1 * raw.double().mean((0, 2, 3)), rtol=1e-2, atol=1e-3)
            torch.testing.assert_close(variance.double(), 0.9 + 0.1 * raw.double().var((0, 2, 3)), rtol=1e-2, atol=1e-3)
        else:
            expected = (raw.double() - mean.double()[:, None, None]) / (variance.double() + 1e-5).sqrt()[:, None, None]
            torch.testing.assert_close(result.double(), expected, rtol=2e-2, atol=2e-2)


def test_the_negative_bit_is_resolved(backend: Backend, device: torch.device) -> None:
    values = torch.randn(4, 3, 6, 8, device=device)
    for raw in (torch._neg_view(values), torch.complex(values, values).conj().imag):
        raw = raw.detach().requires_grad_()
        result = batch(raws=[raw], normalize="dataset", mean=torch._neg_view(MEAN.to(device)), std=STD.to(device))
        expected = (-values.tanh() + MEAN.to(device)[:, None, None]) / STD.to(device)[:, None, None]
        torch.testing.assert_close(result, expected)
        (gradient,) = torch.autograd.grad(result, raw, torch._neg_view(values))
        torch.testing.assert_close(gradient, -values * (1 - values.tanh().square()) / STD.to(device)[:, None, None])


def test_double_backward_that_would_lack_a_term_raises(fused: Backend, device: torch.device) -> None:
    raw = torch.randn(4, 3, 6, 8, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(batch(raws=[raw]).sum(), raw, create_graph=True)
    with pytest.raises(RuntimeError, match="concat_generated: its kernels have no second derivative"):
        torch.autograd.grad((gradient + raw).sum(), raw)


def test_double_backward_through_a_linear_concatenation_is_supported(fused: Backend, device: torch.device) -> None:
    raw = torch.randn(4, 3, 6, 8, device=device, requires_grad=True)
    result = batch(raws=[raw * raw], activation="none", normalize="dataset", mean=MEAN.to(device), std=STD.to(device))
    (gradient,) = torch.autograd.grad(result.sum(), raw, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), raw)
    torch.testing.assert_close(second, (2 / STD.to(device))[:, None, None].expand_as(raw))
