"""What ``winograd_conv2d`` does of tensors that are not the usual ones: right, or an error that names them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from dfkd_fast.kernels import winograd_conv2d, winograd_is_faster


def case() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last), torch.randn(4, 4, 3, 3), torch.randn(4)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1)


def assert_close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.complex64], ids=str)
def test_another_dtype_than_the_images_is_named(name: str, dtype: torch.dtype) -> None:
    x, weight, bias = case()
    given: dict[str, Any] = {"weight": weight, "bias": bias}
    given[name] = given[name].to(dtype)
    with pytest.raises(ValueError, match=f"{name} must be of x's dtype torch.float32, not {dtype}"):
        winograd_conv2d(x, **given)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_another_device_than_the_images_is_named(name: str) -> None:
    x, weight, bias = case()
    given: dict[str, Any] = {"weight": weight, "bias": bias}
    given[name] = given[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} must be on x's device cpu, not on meta"):
        winograd_conv2d(x, **given)
    with pytest.raises(ValueError, match="weight must be on x's device meta, not on cpu"):
        winograd_conv2d(x.to("meta"), weight)


def test_autocast_still_casts_all_three() -> None:
    x, weight, bias = case()
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = (function(x, weight.bfloat16(), bias.half()) for function in (winograd_conv2d, convolved))
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("padding", [1, "same", (1,), (1, 1, 1), (1.0, 1.0), (-1, 1), (0, -1), None], ids=repr)
def test_padding_that_is_no_pair_of_counts_is_named(padding: Any) -> None:
    x, weight, _ = case()
    with pytest.raises(ValueError, match=r"padding must be two counts that leave an output of \(8, 8\), not "):
        winograd_conv2d(x, weight, padding=padding)
    assert not winograd_is_faster(x, weight, padding)


def test_a_list_of_two_counts_is_a_padding() -> None:
    x, weight, _ = case()
    padding: Any = [1, 0]
    assert_close(winograd_conv2d(x, weight, padding=padding), F.conv2d(x, weight, padding=(1, 0)))


def test_other_convolutions_do_not_pay() -> None:
    x, weight = torch.randn(8, 64, 8, 8).to(memory_format=torch.channels_last), torch.randn(64, 64, 3, 3)
    assert winograd_is_faster(x, weight)
    for images, kernels in ((x[0], weight), (x[0, 0], weight), (x, weight[0]), (x, weight[0, 0]), (torch.tensor(0.0), weight)):
        assert not winograd_is_faster(images, kernels)


def test_a_layer_of_such_convolutions_takes_one_image_without_a_batch() -> None:
    from dfkd_fast.surgery import use_cpu_convolutions

    layer = nn.Conv2d(64, 64, 3, padding=1)
    x = torch.randn(64, 8, 8)
    expected = layer(x)
    torch.testing.assert_close(use_cpu_convolutions(layer)(x), expected)


@pytest.mark.parametrize("name", ["x", "bias", "weight", "gradient"])
def test_the_negative_of_what_is_stored_is_read_as_such(name: str) -> None:
    given = dict(zip(("x", "weight", "bias"), case(), strict=True))
    gradient = torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)
    results = []
    for flip in (False, True):
        tensors = {
            key: torch._neg_view(-tensor) if flip and key == name else tensor for key, tensor in {**given, "gradient": gradient}.items()
        }
        leaves = [tensors[key].detach().requires_grad_() for key in given]
        output = winograd_conv2d(leaves[0], leaves[1], leaves[2])
        results.append((output, *torch.autograd.grad(output, leaves, tensors["gradient"])))
    assert_close(*results)


@pytest.mark.parametrize("expanded", [False, True])
def test_no_images_and_no_channels_are_fine(expanded: bool) -> None:
    x, weight, bias = case()
    bias = bias[:1].expand(4) if expanded else bias
    assert winograd_conv2d(x[:0], weight, bias).shape == (0, 4, 8, 8)
    nothing = torch.zeros(2, 0, 8, 8).to(memory_format=torch.channels_last)
    assert torch.equal(winograd_conv2d(nothing, weight[:, :0], bias), bias[:, None, None].expand(2, 4, 8, 8))


def test_weights_that_do_not_tell_that_they_changed_are_not_kept() -> None:
    x, weight, _ = case()
    with torch.inference_mode():
        inferred = weight.clone()
    for _ in range(2):
        with torch.no_grad():
            assert_close(winograd_conv2d(x, inferred, cache_weight=True), convolved(x, inferred))
        with torch.inference_mode():
            inferred.mul_(2)


def test_transforms_of_torch_func_and_tangents_are_the_convolutions() -> None:
    x, weight, _ = case()
    several = torch.stack([x, 2 * x])
    results = []
    for convolution in (winograd_conv2d, convolved):

        def loss(x: Tensor, convolution: Any = convolution) -> Tensor:
            return convolution(x, weight).square().sum()

        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(convolution(forward_ad.make_dual(x, x.flip(0)), weight)).tangent
        jvp = torch.func.jvp(loss, (x,), (x.flip(0),))
        results.append(
            (tangent, *jvp, torch.func.grad(loss)(x), torch.vmap(loss)(several), torch.func.vmap(torch.func.grad(loss))(several))
        )
    torch.testing.assert_close(*results)
