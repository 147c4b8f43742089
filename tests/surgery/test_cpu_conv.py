import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_fast.kernels.conv import col2im_conv2d, im2col_conv2d
from dfkd_fast.surgery import CpuConv2d, cpu_conv, fold, freeze, use_cpu_convolutions, weights_frozen
from dfkd_fast.surgery.conv_selection import Convolution

Choose = Callable[[str], list[Convolution]]

FEW_PIXELS: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": (1, 4), "padding": (0, 2)},
    {"kernel_size": (3, 2), "padding": (2, 0), "stride": (2, 1), "dilation": (1, 3)},
    {"kernel_size": 5, "bias": False},
]
FEW_CHANNELS: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3},
    {"kernel_size": (2, 4), "padding": (0, 3)},
    {"kernel_size": (1, 3), "padding": (0, 1), "bias": False},
]
CASES = [("im2col", {"out_channels": 40, **case}) for case in FEW_PIXELS] + [
    ("col2im", {"in_channels": 27, "out_channels": channels, **case}) for channels in (1, 3) for case in FEW_CHANNELS
]
FEW: list[tuple[str, dict[str, int]]] = [("im2col", {}), ("col2im", {"in_channels": 27, "out_channels": 3})]
"""Algorithms, and channels of a layer that they suit."""


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Convolution]]:
    """Makes an algorithm the fastest of every convolution; returns the list of convolutions for which it is requested."""

    def choose(algorithm: str) -> list[Convolution]:
        requested: list[Convolution] = []

        def fastest(convolution: Convolution) -> str:
            requested.append(convolution)
            return algorithm

        monkeypatch.setattr(cpu_conv, "fastest_algorithm", fastest)
        return requested

    return choose


def layer_and_images(case: dict[str, Any], dtype: torch.dtype = torch.float64) -> tuple[nn.Conv2d, Tensor]:
    torch.manual_seed(0)
    layer = nn.Conv2d(**{"in_channels": 3, "out_channels": 40} | case).to(dtype).to(memory_format=torch.channels_last)
    images = torch.randn(2, layer.in_channels, 5, 6, dtype=dtype)
    return layer, images.to(memory_format=torch.channels_last).requires_grad_()


def forbid_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise AssertionError("a convolution ran")

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", fail)


@pytest.mark.parametrize(("algorithm", "case"), CASES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_values_and_gradients_equal_pytorchs(
    algorithm: str, case: dict[str, Any], layout: str, choose: Choose, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, images = layer_and_images(case)
    if layout != "channels_last":
        images = images.detach().contiguous() if layout == "contiguous" else images.detach().repeat(1, 1, 1, 2)[..., ::2]
        images.requires_grad_()
    expected = layer(images)
    weights = torch.randn_like(expected)
    inputs = [images, *layer.parameters()]
    gradients = torch.autograd.grad((weights * expected).sum(), inputs)
    choose(algorithm)
    use_cpu_convolutions(layer)
    forbid_convolutions(monkeypatch)
    output = layer(images)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(torch.autograd.grad((weights * output).sum(), inputs), gradients)
    assert output.is_contiguous(memory_format=torch.channels_last)


def padding_of(layer: nn.Conv2d) -> tuple[int, ...]:
    assert not isinstance(layer.padding, str)
    return layer.padding


@pytest.mark.parametrize("case", FEW_PIXELS, ids=str)
def test_im2col_convolution_passes_gradcheck_and_gradgradcheck(case: dict[str, Any]) -> None:
    layer, images = layer_and_images({"out_channels": 2, **case})

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return im2col_conv2d(x, weight, layer.stride, padding_of(layer), layer.dilation)

    assert torch.autograd.gradcheck(product, (images, layer.weight))
    assert torch.autograd.gradgradcheck(product, (images, layer.weight))


@pytest.mark.parametrize("case", FEW_CHANNELS, ids=str)
def test_col2im_convolution_passes_gradcheck_and_gradgradcheck(case: dict[str, Any]) -> None:
    layer, images = layer_and_images({"out_channels": 2, **case})

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return col2im_conv2d(x, weight, padding_of(layer))

    assert torch.autograd.gradcheck(product, (images, layer.weight))
    assert torch.autograd.gradgradcheck(product, (images, layer.weight))


@pytest.mark.parametrize(("algorithm", "channels"), FEW)
def test_the_gradient_of_channels_last_weights_has_their_strides(algorithm: str, channels: dict[str, int], choose: Choose) -> None:
    choose(algorithm)
    layer, images = layer_and_images({"kernel_size": 3, "padding": 1} | channels)
    use_cpu_convolutions(layer)(images).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.stride() == layer.weight.stride()


@pytest.mark.parametrize("lowered", [False, True], ids=["float32 weights", "bfloat16 weights"])
def test_autocast_computes_in_its_dtype(lowered: bool, choose: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, images = layer_and_images({"kernel_size": 3, "padding": 1}, torch.float32)
    if lowered:
        layer.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(images)
        requested = choose("im2col")
        use_cpu_convolutions(layer)
        forbid_convolutions(monkeypatch)
        output = layer(images)
    assert [convolution.dtype for convolution in requested] == [torch.bfloat16]
    assert output.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, rtol=0.02, atol=0.02)
    output.sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == layer.weight.dtype


@pytest.mark.parametrize(("algorithm", "channels"), FEW)
def test_no_gradient_is_computed_for_frozen_weights(algorithm: str, channels: dict[str, int], choose: Choose) -> None:
    requested = choose(algorithm)
    layer, images = layer_and_images({"kernel_size": 3, "padding": 1} | channels)
    use_cpu_convolutions(layer)
    with weights_frozen(layer):
        output = layer(images)
    assert [(each.of_x, each.of_weight) for each in requested] == [(True, False)]
    assert layer.weight.requires_grad
    assert output.grad_fn is not None
    output.sum().backward()
    assert images.grad is not None
    assert layer.weight.grad is None


def test_only_convolutions_without_groups_and_with_zero_padding_are_replaced() -> None:
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
    use_cpu_convolutions(network)
    assert [type(layer) is CpuConv2d for layer in network] == [True, False, False, True, False]
    assert network.state_dict().keys() == before.state_dict().keys()
    images = torch.randn(3, 4, 9, 8)
    torch.testing.assert_close(network(images), before(images))


def test_batch_norms_after_cpu_convolutions_can_be_folded() -> None:
    network = freeze(use_cpu_convolutions(nn.Sequential(nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40)).to(memory_format=torch.channels_last)))
    images = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(fold(network)(images), network(images))


def test_an_empty_batch_is_supported() -> None:
    assert use_cpu_convolutions(nn.Conv2d(3, 40, 3))(torch.empty(0, 3, 5, 5)).shape == (0, 40, 3, 3)


@pytest.mark.parametrize("frozen", [False, True])
def test_winograd_convolutions_of_frozen_layers_cache_their_weights(frozen: bool, choose: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last).requires_grad_(not frozen)
    images = torch.randn(8, 64, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    expected = layer(images)
    requested = choose("winograd")
    use_cpu_convolutions(layer)
    forbid_convolutions(monkeypatch)
    torch.testing.assert_close(layer(images), expected, rtol=1e-4, atol=1e-4)
    assert [convolution.cached_weight for convolution in requested] == [frozen]


@pytest.mark.parametrize("channels", [{}, {"in_channels": 27, "out_channels": 3}, {"in_channels": 64, "out_channels": 64}], ids=str)
def test_compilation_gives_one_graph_with_pytorchs_convolution(channels: dict[str, int], choose: Choose) -> None:
    choose("im2col")
    layer, images = layer_and_images({"kernel_size": 3, "padding": 1} | channels, torch.float32)
    expected = layer(images)
    compiled = torch.compile(use_cpu_convolutions(layer), fullgraph=True, backend="eager")
    assert torch.equal(compiled(images), expected)


def test_a_layer_that_is_frozen_later_is_marked_frozen_when_converted_again() -> None:
    layer = use_cpu_convolutions(nn.Conv2d(3, 8, 3))
    assert isinstance(layer, CpuConv2d) and not layer.frozen
    use_cpu_convolutions(freeze(layer))
    assert layer.frozen


def test_a_dtype_mismatch_is_an_error() -> None:
    layer = use_cpu_convolutions(nn.Conv2d(3, 40, 3).to(memory_format=torch.channels_last))
    with pytest.raises(RuntimeError, match="type"):
        layer(torch.randn(1, 3, 5, 5).double())
