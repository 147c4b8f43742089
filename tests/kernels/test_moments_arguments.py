"""Moments of unusual activations: correct, or an error that names them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dfkd_fast.kernels import Backend, PartialMoments, channel_moments, channel_sums, combine_moments, partial_moments
from tests.kernels import oracles

FUNCTIONS = pytest.mark.parametrize("function", [channel_moments, channel_sums, partial_moments])
SIZES = pytest.mark.parametrize("rows", [2, 2000])  # below and above the threshold of the CPU kernels


@FUNCTIONS
@SIZES
def test_complex_dtypes_and_sparse_layouts_are_named(function: Callable[[Tensor], Any], rows: int) -> None:
    x = torch.zeros(rows, 3, 2, 2)
    with pytest.raises(ValueError, match=r"x must be real, not torch\.complex64"):
        function(x * 1j)
    with pytest.raises(ValueError, match=r"x must have the layout torch\.strided, not torch\.sparse_coo"):
        function(x.to_sparse())


@SIZES
def test_integers_are_computed_in_float32(rows: int) -> None:
    x = torch.randint(-9, 9, (rows, 3, 2, 2))
    torch.testing.assert_close(channel_moments(x), oracles.moments(x.float()))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "imaginary part"])
def test_the_negative_bit_is_resolved(backend: Backend, device: torch.device, layout: str) -> None:
    values = torch.randn(4, 5, 6, 3, device=device)
    negative = (
        torch.complex(values, values).conj().imag if layout == "imaginary part" else torch._neg_view(oracles.with_layout(values, layout))
    )
    x = negative.detach().requires_grad_()
    mean, variance = channel_moments(x)
    torch.testing.assert_close((mean, variance), oracles.moments(-values), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(channel_sums(x)[0].float(), -values.sum((0, 2, 3)), rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(variance.sum(), x)
    torch.testing.assert_close(gradient, (-values - mean.detach()[:, None, None]) * 2 / (4 * 6 * 3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [channel_moments, channel_sums])
def test_double_backward_that_would_lack_a_term_raises(fused: Backend, device: torch.device, function: Callable[[Tensor], Any]) -> None:
    x = oracles.random(3, 4, 5, 3, device=device)
    (gradient,) = torch.autograd.grad(function(x)[1].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{function.__name__}: its kernels have no second derivative"):
        torch.autograd.grad((gradient + x).sum(), x)


PARTS, CENTER = torch.zeros(2, 3, 4), torch.zeros(3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": []}, r"layers must be a non-empty list or tuple of PartialMoments, not \[\]"),
        ({"layers": PARTS}, "layers must be a non-empty list or tuple of PartialMoments, not Tensor"),
        ({"layers": PartialMoments(PARTS, CENTER)}, r"layers must be a .* of PartialMoments, not \['Tensor', 'Tensor'\]"),
        ({"layers": (each for each in [PartialMoments(PARTS, CENTER)])}, "layers must be a .* of PartialMoments, not generator"),
        ({"layers": [PartialMoments(PARTS[0], CENTER)]}, r"layers\[0\] must have parts \(2, C, parts\) .*, not \(3, 4\) and \(3,\)"),
        ({"layers": [PartialMoments(PARTS, CENTER[:2])]}, r"layers\[0\] must have parts .*, not \(2, 3, 4\) and \(2,\)"),
        ({"layers": [PartialMoments(PARTS.half(), CENTER.half())]}, r"layers must have the dtype .*float64, not torch\.float16"),
        ({"layers": [PartialMoments(PARTS.int(), CENTER.int())]}, r"layers must have the dtype .*float64, not torch\.int32"),
        (
            {"layers": [PartialMoments(PARTS, CENTER), PartialMoments(PARTS.double(), CENTER)]},
            r"layers\[1\]\.parts must be torch\.float32 on cpu, .*, not torch\.float64 on cpu",
        ),
        ({"layers": [PartialMoments(PARTS.to("meta"), CENTER)]}, r"layers\[0\]\.parts must be .*, not torch\.float32 on meta"),
        ({"layers": [PartialMoments(PARTS, CENTER.clone().requires_grad_())]}, r"layers\[0\]\.center requires grad, .*"),
        ({"scale": torch.ones(2, 1, 3, requires_grad=True)}, "scale requires grad, .*: pass a detached tensor"),
        ({"scale": torch.ones(2, 3)}, r"scale must be torch\.float32 \(2, 1, 3\) on cpu, not torch\.float32 \(2, 3\) on cpu"),
        ({"shift": torch.ones(2, 1, 3).double()}, r"shift must be torch\.float32 .*, not torch\.float64 \(2, 1, 3\) on cpu"),
        ({"shift": torch.ones(2, 1, 3, device="meta")}, r"shift must be torch\.float32 .* on cpu, not torch\.float32 \(2, 1, 3\) on meta"),
    ],
)
def test_invalid_partial_moments_are_named(changes: dict[str, Any], message: str) -> None:
    arguments: Any = {"layers": [PartialMoments(PARTS, CENTER)]} | changes
    with pytest.raises(ValueError, match=f"^{message}$"):
        combine_moments(**arguments)


def test_negative_bits_of_partial_moments_are_resolved(backend: Backend, device: torch.device) -> None:
    parts, center, scale = torch.rand(2, 3, 4).to(device), torch.randn(3).to(device), torch.randn(2, 1, 3).to(device)
    negative = [torch._neg_view(-tensor) for tensor in (parts, center, scale)]
    expected = combine_moments([PartialMoments(parts, center)], scale)
    torch.testing.assert_close(combine_moments([PartialMoments(negative[0], negative[1])], negative[2]), expected)


def test_scale_and_shift_may_have_any_strides(backend: Backend, device: torch.device) -> None:
    x = oracles.random(3, 4, 5, 3, device=device)
    scale, shift = torch.randn(2, 4, 1, 2, device=device).permute(3, 0, 2, 1)
    table = combine_moments([partial_moments(x)], scale, shift)
    torch.testing.assert_close(table[:, 0], torch.stack(oracles.moments(x)) * scale[:, 0] + shift[:, 0], rtol=1e-5, atol=1e-5)
