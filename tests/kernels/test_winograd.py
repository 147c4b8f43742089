import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_fast.kernels import use_backend, winograd_conv2d, winograd_is_faster
from dfkd_fast.kernels.conv import winograd


def case(batch: int, channels: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(batch, channels[0], *size).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(channels[1], channels[0], 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    return x, weight


def oracle(inputs: list[Tensor], padding: tuple[int, int], gradient: Tensor | None = None) -> tuple[Tensor, ...]:
    """Output in float64, followed by the gradients of the inputs if an output gradient is given."""
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    output = F.conv2d(wide[0], wide[1], wide[2] if len(wide) > 2 else None, padding=padding)
    return output, *([] if gradient is None else torch.autograd.grad(output, wide, gradient.double()))


@pytest.mark.parametrize("padding", [(1, 1), (0, 0), (2, 0), (0, 1)], ids=str)
@pytest.mark.parametrize("size", [(4, 4), (8, 12), (7, 9), (3, 3), (5, 18)], ids=str)
@pytest.mark.parametrize("channels", [(1, 1), (5, 3), (64, 70)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_values_and_gradients_match_direct_convolution(
    padding: tuple[int, int], size: tuple[int, int], channels: tuple[int, int], biased: bool
) -> None:
    x, weight = case(3, channels, size)
    bias = torch.randn(channels[1]).requires_grad_() if biased else None
    output = winograd_conv2d(x, weight, bias, padding)
    gradient = torch.randn_like(output)
    inputs = [x, weight, *([] if bias is None else [bias])]
    expected, *gradients = oracle(inputs, padding, gradient)
    assert type(output.grad_fn).__name__ == "WinogradBackward"
    assert output.is_contiguous(memory_format=torch.channels_last)
    # Sums of up to 9 · 70 products of values near 1, whose transforms are up to 100 times larger.
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=2e-3)
    for ours, theirs in zip(torch.autograd.grad(output, inputs, gradient), gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=2e-3)


def test_a_batch_in_several_chunks_gives_the_same_results(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = case(7, (6, 5), (9, 6))
    whole = winograd_conv2d(x, weight)
    gradient = torch.randn_like(whole)
    gradients = torch.autograd.grad(whole, (x, weight), gradient)
    monkeypatch.setattr(winograd, "CHUNK", 2 * 36 * 6 * 6)
    assert len(list(winograd._chunks(x, weight, (3, 2)))) == 4
    pieces = winograd_conv2d(x, weight)
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(torch.autograd.grad(pieces, (x, weight), gradient), gradients, rtol=1e-4, atol=1e-3)


def test_errors_are_a_few_times_those_of_direct_convolution() -> None:
    x, weight = case(4, (64, 64), (16, 16))
    (expected,) = oracle([x, weight], (1, 1))
    direct = (F.conv2d(x, weight, padding=1) - expected).abs().max()
    assert (winograd_conv2d(x, weight) - expected).abs().max() < 20 * direct


def test_cached_transforms_follow_in_place_changes_of_the_weight() -> None:
    x, weight = case(2, (4, 4), (8, 8))
    weight.requires_grad_(False)
    for _ in range(3):
        output = winograd_conv2d(x, weight, cache_weight=True)
        torch.testing.assert_close(output, F.conv2d(x, weight, padding=1), rtol=1e-3, atol=1e-3)
        assert winograd._transform_cache[weight][1] is winograd._transform_weight(weight, cache_weight=True)
        weight.mul_(2)
    weight.data = torch.randn_like(weight)
    torch.testing.assert_close(winograd_conv2d(x, weight, cache_weight=True), F.conv2d(x, weight, padding=1), rtol=1e-3, atol=1e-3)


def test_cached_transforms_are_freed_with_the_weight() -> None:
    x, weight = case(2, (4, 4), (8, 8))
    frozen = weight.detach().clone()
    before = len(winograd._transform_cache)
    winograd_conv2d(x.detach(), frozen, cache_weight=True)
    assert len(winograd._transform_cache) == before + 1
    del frozen
    assert len(winograd._transform_cache) == before


def test_inputs_that_do_not_require_grad_get_none() -> None:
    x, weight = case(2, (4, 4), (8, 8))
    winograd_conv2d(x, weight.detach()).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_second_derivatives_match_direct_convolution() -> None:
    x, weight = case(2, (3, 4), (6, 5))
    products = []
    for function in (winograd_conv2d, lambda x, w: F.conv2d(x, w, padding=1)):
        gradients = torch.autograd.grad(function(x, weight).square().sum(), (x, weight), create_graph=True)
        products.append(torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), (x, weight)))  # type: ignore[arg-type]
    for ours, theirs in zip(*products, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-2 * float(theirs.abs().max()))


@pytest.mark.parametrize("other", ["float64", "bfloat16", "contiguous", "forced", "autocast"])
def test_unsupported_calls_use_direct_convolution(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd.Winograd, "apply", None)
    x, weight = (tensor.detach() for tensor in case(16, (64, 64), (8, 8)))
    assert winograd_is_faster(x, weight)
    if other == "contiguous":
        x = x.contiguous()
    elif other in ("float64", "bfloat16"):
        x, weight = (tensor.to(getattr(torch, other)) for tensor in (x, weight))
    with use_backend("reference" if other == "forced" else None), torch.autocast("cpu", torch.bfloat16, enabled=other == "autocast"):
        assert not winograd_is_faster(x, weight)
        torch.testing.assert_close(winograd_conv2d(x, weight), F.conv2d(x, weight, padding=1))


def test_winograd_is_faster_above_thresholds_that_are_lower_for_cached_weights() -> None:
    def is_faster(batch: int, channels: tuple[int, int], size: int, *, cache_weight: bool = False) -> bool:
        return winograd_is_faster(*case(batch, channels, (size, size)), cache_weight=cache_weight)

    assert is_faster(8, (64, 64), 8)
    assert not is_faster(8, (64, 32), 8)
    assert not is_faster(7, (128, 64), 8)
    assert is_faster(7, (128, 64), 8, cache_weight=True)
    assert not is_faster(1, (64, 64), 8, cache_weight=True), "below the minimum number of elements"
    assert not winograd_is_faster(torch.zeros(512, 64, 1, 1), torch.zeros(64, 64, 3, 3), (0, 0), cache_weight=True)


@pytest.mark.parametrize(
    ("weight", "bias", "padding", "named"),
    [
        ((4, 3, 5, 5), (4,), (1, 1), "weight"),
        ((4, 2, 3, 3), (4,), (1, 1), "weight"),
        ((4, 3, 3, 3), (3,), (1, 1), "bias"),
        ((4, 3, 3, 3), (4,), (1, -1), "padding"),
        ((4, 3, 3, 3), (4,), (0, 0), "padding"),
    ],
    ids=str,
)
def test_invalid_shapes_are_named(weight: tuple[int, ...], bias: tuple[int, ...], padding: tuple[int, int], named: str) -> None:
    x = torch.zeros(1, 3, 2, 8).to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=named):
        winograd_conv2d(x, torch.zeros(weight), torch.zeros(bias), padding)


def test_a_strided_bias_is_supported() -> None:
    x, weight = case(2, (4, 4), (8, 8))
    bias = torch.randn(8)[::2]
    torch.testing.assert_close(winograd_conv2d(x, weight, bias), F.conv2d(x, weight, bias, padding=1), rtol=1e-3, atol=1e-3)
