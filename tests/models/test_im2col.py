import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_fast.models import Im2colConv2d, fold, freeze, im2col, untaught, use_im2col

GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": (1, 4), "padding": (0, 2)},
    {"kernel_size": (3, 2), "padding": (2, 0), "stride": (2, 1), "dilation": (1, 3)},
    {"kernel_size": 5, "bias": False},
]


def layer_and_images(geometry: dict[str, Any], dtype: torch.dtype = torch.float64) -> tuple[nn.Conv2d, Tensor]:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 40, **geometry).to(dtype).to(memory_format=torch.channels_last)
    return layer, torch.randn(2, 3, 5, 6, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()


def forbid_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise AssertionError("a convolution ran")

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", fail)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_values_and_gradients_are_those_of_a_convolution(geometry: dict[str, Any], layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, images = layer_and_images(geometry)
    if layout != "channels_last":
        images = images.detach().contiguous() if layout == "contiguous" else torch.randn(2, 3, 5, 12, dtype=images.dtype)[..., ::2]
        images.requires_grad_()
    expected = layer(images)
    weights = torch.randn_like(expected)
    inputs = [images, *layer.parameters()]
    gradients = torch.autograd.grad((weights * expected).sum(), inputs)
    use_im2col(layer)
    forbid_convolutions(monkeypatch)
    output = layer(images)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(torch.autograd.grad((weights * output).sum(), inputs), gradients)
    assert output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_second_derivatives_are_those_of_finite_differences(geometry: dict[str, Any]) -> None:
    layer, images = layer_and_images(geometry)

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return im2col._Product.apply(x, weight, layer.stride, layer.padding, layer.dilation)

    weight = layer.weight.detach()[:2].requires_grad_()
    assert torch.autograd.gradcheck(product, (images, weight))
    assert torch.autograd.gradgradcheck(product, (images, weight))


def test_the_gradient_of_channels_last_weights_lies_as_they_do() -> None:
    layer, images = layer_and_images({"kernel_size": 3, "padding": 1})
    use_im2col(layer)(images).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.stride() == layer.weight.stride()


def test_many_pixels_are_convolved(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = use_im2col(nn.Conv2d(3, 8, 3, padding=1).to(memory_format=torch.channels_last))
    forbid_convolutions(monkeypatch)
    layer(torch.randn(1, 3, 4, 4))
    with pytest.raises(AssertionError, match="a convolution ran"):
        layer(torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("lowered", [False, True], ids=["float32 weights", "bfloat16 weights"])
def test_autocast_computes_in_its_dtype_as_a_convolution_does(lowered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, images = layer_and_images({"kernel_size": 3, "padding": 1}, torch.float32)
    if lowered:
        layer.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(images)
        use_im2col(layer)
        forbid_convolutions(monkeypatch)
        output = layer(images)
    assert output.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, rtol=0.02, atol=0.02)
    output.sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == layer.weight.dtype


def test_frozen_weights_cost_no_gradient() -> None:
    layer, images = layer_and_images({"kernel_size": 3, "padding": 1})
    use_im2col(layer)
    with untaught(layer):
        output = layer(images)
    assert layer.weight.requires_grad
    assert output.grad_fn is not None
    output.sum().backward()
    assert images.grad is not None
    assert layer.weight.grad is None


def test_only_ordinary_convolutions_change() -> None:
    class Other(nn.Conv2d):
        pass

    network = nn.Sequential(
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, padding="same"),
        Other(4, 4, 3),
    )
    before = copy.deepcopy(network)
    use_im2col(network)
    assert [type(layer) is Im2colConv2d for layer in network] == [True, False, False, True, False]
    assert network.state_dict().keys() == before.state_dict().keys()
    images = torch.randn(3, 4, 9, 8)
    torch.testing.assert_close(network(images), before(images))


def test_batch_norms_behind_them_fold() -> None:
    network = freeze(use_im2col(nn.Sequential(nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40)).to(memory_format=torch.channels_last)))
    images = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(fold(network)(images), network(images))


def test_an_empty_batch_passes() -> None:
    assert use_im2col(nn.Conv2d(3, 40, 3))(torch.empty(0, 3, 5, 5)).shape == (0, 40, 3, 3)
