"""What ``concat_generated`` does of outputs, dtypes and constants that are not the usual ones: right, or an error that names them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dfkd_fast.kernels import Backend, concat_generated, use_backend

MEAN, STD = torch.tensor([0.5, -0.25, 0.0]), torch.tensor([0.5, 2.0, 0.25])


def batch(**changed: Any) -> Tensor:
    arguments: dict[str, Any] = {"activation": "tanh", "normalize": "none", **changed}
    return concat_generated(arguments.pop("raws", [torch.randn(4, 3, 6, 8)]), **arguments)


def refused(message: str, **changed: Any) -> None:
    """By every backend that a CPU has: the checks come before the choice."""
    backends: tuple[Backend | None, ...] = ("reference", "numba", None)
    for backend in backends:
        with use_backend(backend), pytest.raises(ValueError, match=message):
            batch(**changed)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64], ids=str)
def test_images_are_of_a_floating_dtype(dtype: torch.dtype) -> None:
    refused(f"out_dtype must be a floating dtype, not {dtype}", out_dtype=dtype)
    refused(f"out must be of a floating dtype, not {dtype}", out=torch.zeros(4, 3, 6, 8, dtype=dtype))
    raws = [torch.zeros(4, 3, 6, 8), torch.zeros(4, 3, 6, 8, dtype=dtype)]
    refused(rf"raws\[1\] must be of a floating dtype, not {dtype}", raws=raws)


@pytest.mark.parametrize("rows", [4, 200])
def test_float64_is_the_reference_backends_forwards_and_backwards(rows: int) -> None:
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
def test_a_batch_with_two_elements_at_an_address_is_refused(out: Tensor) -> None:
    refused("out must have an address for every element, not the strides", out=out)
    assert not out.any()


@pytest.mark.parametrize("activation", ["tanh", "none"])
@pytest.mark.parametrize(("first", "named"), [(2, 0), (0, 0), (5, 0), (8, 1)])
def test_a_batch_over_its_inputs_is_refused(first: int, named: int, activation: str) -> None:
    memory = torch.randn(20, 3, 6, 8)
    before = memory.clone()
    raws = [memory[first : first + 4], memory[4:8]] if named == 0 else [torch.randn(4, 3, 6, 8), memory[7:11]]
    refused(rf"out shares memory with raws\[{named}\]", raws=raws, out=memory[:8], activation=activation)
    assert torch.equal(memory, before)


def test_a_batch_beside_and_between_its_inputs_is_written(backend: Backend, device: torch.device) -> None:
    memory = torch.randn(8, 3, 6, 16, device=device)
    for raw, out in ((memory[..., ::2], memory[..., 1::2]), (memory[4:], memory[:4])):
        expected = raw.tanh()
        batch(raws=[raw], out=out)
        torch.testing.assert_close(out, expected)


def test_a_batch_that_requires_grad_is_written_without_a_graph_only() -> None:
    for out in (torch.zeros(4, 3, 6, 8, requires_grad=True), torch.zeros(4, 3, 6, 8, requires_grad=True) * 1):
        refused("out cannot be given where a gradient is recorded: call under torch.no_grad", out=out)
        raw = torch.randn(4, 3, 6, 8)
        with torch.no_grad():
            torch.testing.assert_close(batch(raws=[raw], out=out), raw.tanh())


def test_one_tensor_is_not_a_sequence() -> None:
    refused(r"raws must be a sequence of tensors \(B, C, H, W\), not one Tensor", raws=torch.zeros(4, 3, 6, 8))


def test_only_two_memory_formats_are_made() -> None:
    refused("memory_format must be torch.channels_last or torch.contiguous_format, not torch.preserve", memory_format=torch.preserve_format)


def running(training: bool, **changed: Any) -> dict[str, Any]:
    return {"normalize": "batch", "training": [training], "running_means": [MEAN.clone()], "running_vars": [STD.clone()], **changed}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["running_means", "running_vars"])
def test_running_statistics_that_do_not_fit_are_named(name: str, training: bool) -> None:
    for wrong in (torch.ones(1), torch.ones(4), torch.ones(3, 1), torch.tensor(1.0)):
        shape = str(tuple(wrong.shape)).replace("(", r"\(").replace(")", r"\)")
        refused(rf"{name}\[0\] must be \(3,\), not {shape}", **running(training, **{name: [wrong]}))
    refused(rf"{name}\[0\] is on meta, the inputs on cpu", **running(training, **{name: [torch.ones(3, device="meta")]}))
    refused(rf"{name}\[0\] must be of a floating dtype, not torch.int64", **running(training, **{name: [torch.ones(3).long()]}))
    refused(rf"{name}\[0\] must be real, not torch.complex64", **running(training, **{name: [torch.ones(3) * 1j]}))
    refused(rf"{name}\[0\] requires grad", **running(training, **{name: [torch.ones(3, requires_grad=True)]}))


@pytest.mark.parametrize("name", ["mean", "std"])
def test_constants_that_do_not_fit_are_named(name: str) -> None:
    dataset = {"normalize": "dataset", "mean": MEAN, "std": STD}
    refused(f"{name} is on meta, the inputs on cpu", **{**dataset, name: MEAN.to("meta")})
    refused(f"{name} must be real, not torch.complex64", **{**dataset, name: MEAN * 1j})
    refused(
        f"{name} requires grad, but the batch is differentiable with respect to raws only: give {name}.detach",
        **{**dataset, name: (MEAN + 1).requires_grad_()},
    )


def test_a_momentum_that_is_no_number_is_named() -> None:
    refused("momentum must be a number, not None", **running(True, momentum=None))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("raw_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_reference_too_moves_running_statistics_of_other_dtypes(dtype: torch.dtype, raw_dtype: torch.dtype) -> None:
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


def test_the_negative_of_what_is_stored_is_read_as_such(backend: Backend, device: torch.device) -> None:
    values = torch.randn(4, 3, 6, 8, device=device)
    for raw in (torch._neg_view(values), torch.complex(values, values).conj().imag):
        raw = raw.detach().requires_grad_()
        result = batch(raws=[raw], normalize="dataset", mean=torch._neg_view(MEAN.to(device)), std=STD.to(device))
        expected = (-values.tanh() + MEAN.to(device)[:, None, None]) / STD.to(device)[:, None, None]
        torch.testing.assert_close(result, expected)
        (gradient,) = torch.autograd.grad(result, raw, torch._neg_view(values))
        torch.testing.assert_close(gradient, -values * (1 - values.tanh().square()) / STD.to(device)[:, None, None])


def test_a_second_derivative_of_a_kernel_is_refused_where_it_would_lack_a_term(fused: Backend, device: torch.device) -> None:
    raw = torch.randn(4, 3, 6, 8, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(batch(raws=[raw]).sum(), raw, create_graph=True)
    with pytest.raises(RuntimeError, match="concat_generated: its kernels have no second derivative"):
        torch.autograd.grad((gradient + raw).sum(), raw)


def test_a_placement_alone_may_stand_in_a_second_derivative(fused: Backend, device: torch.device) -> None:
    raw = torch.randn(4, 3, 6, 8, device=device, requires_grad=True)
    result = batch(raws=[raw * raw], activation="none", normalize="dataset", mean=MEAN.to(device), std=STD.to(device))
    (gradient,) = torch.autograd.grad(result.sum(), raw, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), raw)
    torch.testing.assert_close(second, (2 / STD.to(device))[:, None, None].expand_as(raw))
