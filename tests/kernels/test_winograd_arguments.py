"""``winograd_conv2d`` with unusual tensors: correct, or an error that names them."""

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
def test_a_mismatched_dtype_is_named(name: str, dtype: torch.dtype) -> None:
    x, weight, bias = case()
    kwargs: dict[str, Any] = {"weight": weight, "bias": bias}
    kwargs[name] = kwargs[name].to(dtype)
    with pytest.raises(ValueError, match=f"{name} must have the dtype of x, torch.float32, not {dtype}"):
        winograd_conv2d(x, **kwargs)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_mismatched_device_is_named(name: str) -> None:
    x, weight, bias = case()
    kwargs: dict[str, Any] = {"weight": weight, "bias": bias}
    kwargs[name] = kwargs[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} must be on the device of x, cpu, not on meta"):
        winograd_conv2d(x, **kwargs)
    with pytest.raises(ValueError, match="weight must be on the device of x, meta, not on cpu"):
        winograd_conv2d(x.to("meta"), weight)


def test_autocast_casts_all_three_tensors() -> None:
    x, weight, bias = case()
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = (function(x, weight.bfloat16(), bias.half()) for function in (winograd_conv2d, convolved))
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("padding", [1, "same", (1,), (1, 1, 1), (1.0, 1.0), (-1, 1), (0, -1), None], ids=repr)
def test_invalid_padding_is_named(padding: Any) -> None:
    x, weight, _ = case()
    with pytest.raises(ValueError, match=r"padding must be two integers ≥ 0 with a non-empty output for input \(8, 8\), not "):
        winograd_conv2d(x, weight, padding=padding)
    assert not winograd_is_faster(x, weight, padding)


def test_padding_may_be_a_list() -> None:
    x, weight, _ = case()
    padding: Any = [1, 0]
    assert_close(winograd_conv2d(x, weight, padding=padding), F.conv2d(x, weight, padding=(1, 0)))


def test_winograd_is_not_faster_for_other_convolutions() -> None:
    x, weight = torch.randn(8, 64, 8, 8).to(memory_format=torch.channels_last), torch.randn(64, 64, 3, 3)
    assert winograd_is_faster(x, weight)
    for images, kernels in ((x[0], weight), (x[0, 0], weight), (x, weight[0]), (x, weight[0, 0]), (torch.tensor(0.0), weight)):
        assert not winograd_is_faster(images, kernels)


def test_a_layer_with_cpu_convolutions_accepts_unbatched_input() -> None:
    from dfkd_fast.surgery import use_cpu_convolutions

    layer = nn.Conv2d(64, 64, 3, padding=1)
    x = torch.randn(64, 8, 8)
    expected = layer(x)
    torch.testing.assert_close(use_cpu_convolutions(layer)(x), expected)


@pytest.mark.parametrize("name", ["x", "bias", "weight", "gradient"])
def test_the_negative_bit_is_resolved(name: str) -> None:
    kwargs = dict(zip(("x", "weight", "bias"), case(), strict=True))
    gradient = torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)
    results = []
    for flip in (False, True):
        tensors = {
            key: torch._neg_view(-tensor) if flip and key == name else tensor for key, tensor in {**kwargs, "gradient": gradient}.items()
        }
        leaves = [tensors[key].detach().requires_grad_() for key in kwargs]
        output = winograd_conv2d(leaves[0], leaves[1], leaves[2])
        results.append((output, *torch.autograd.grad(output, leaves, tensors["gradient"])))
    assert_close(*results)


@pytest.mark.parametrize("expanded", [False, True])
def test_empty_batches_and_channels_are_supported(expanded: bool) -> None:
    x, weight, bias = case()
    bias = bias[:1].expand(4) if expanded else bias
    assert winograd_conv2d(x[:0], weight, bias).shape == (0, 4, 8, 8)
    nothing = torch.zeros(2, 0, 8, 8).to(memory_format=torch.channels_last)
    assert torch.equal(winograd_conv2d(nothing, weight[:, :0], bias), bias[:, None, None].expand(2, 4, 8, 8))


def test_transforms_of_inference_tensors_are_not_cached() -> None:
    x, weight, _ = case()
    with torch.inference_mode():
        inferred = weight.clone()
    for _ in range(2):
        with torch.no_grad():
            assert_close(winograd_conv2d(x, inferred, cache_weight=True), convolved(x, inferred))
        with torch.inference_mode():
            inferred.mul_(2)


def test_torch_func_and_forward_mode_use_direct_convolution() -> None:
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
