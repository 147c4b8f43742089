import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_fast.kernels import winograd_conv2d
from dfkd_fast.kernels.conv import col2im_conv2d, im2col_conv2d
from dfkd_fast.surgery import CpuConv2d, cpu_conv, fold, freeze, use_cpu_convolutions, weights_frozen

HAS_FAST_FLOAT32_MATMUL = cpu_conv.has_fast_float32_matmul
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
CASES = [{"out_channels": 40, **case} for case in FEW_PIXELS] + [
    {"in_channels": 27, "out_channels": channels, **case} for channels in (1, 3) for case in FEW_CHANNELS
]


@pytest.fixture(autouse=True)
def fast_float32_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same selection on every CPU."""
    monkeypatch.setattr(cpu_conv, "has_fast_float32_matmul", lambda: True)


def layer_and_images(case: dict[str, Any], dtype: torch.dtype = torch.float64) -> tuple[nn.Conv2d, Tensor]:
    torch.manual_seed(0)
    layer = nn.Conv2d(**{"in_channels": 3, "out_channels": 40} | case).to(dtype).to(memory_format=torch.channels_last)
    images = torch.randn(2, layer.in_channels, 5, 6, dtype=dtype)
    return layer, images.to(memory_format=torch.channels_last).requires_grad_()


def forbid_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise AssertionError("a convolution ran")

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", fail)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_values_and_gradients_equal_pytorchs(case: dict[str, Any], layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, images = layer_and_images(case)
    if layout != "channels_last":
        images = images.detach().contiguous() if layout == "contiguous" else images.detach().repeat(1, 1, 1, 2)[..., ::2]
        images.requires_grad_()
    expected = layer(images)
    weights = torch.randn_like(expected)
    inputs = [images, *layer.parameters()]
    gradients = torch.autograd.grad((weights * expected).sum(), inputs)
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


@pytest.mark.parametrize("channels", [{}, {"in_channels": 27, "out_channels": 3}], ids=["few pixels", "few channels"])
def test_the_gradient_of_channels_last_weights_has_their_strides(channels: dict[str, int]) -> None:
    layer, images = layer_and_images({"kernel_size": 3, "padding": 1} | channels)
    use_cpu_convolutions(layer)(images).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.stride() == layer.weight.stride()


def test_many_output_pixels_use_pytorchs_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = use_cpu_convolutions(nn.Conv2d(3, 8, 3, padding=1).to(memory_format=torch.channels_last))
    forbid_convolutions(monkeypatch)
    layer(torch.randn(1, 3, 4, 4))
    with pytest.raises(AssertionError, match="a convolution ran"):
        layer(torch.randn(2, 3, 4, 4))


def test_few_channels_in_bfloat16_use_pytorchs_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, images = layer_and_images({"kernel_size": 3, "padding": 1, "in_channels": 27, "out_channels": 3}, torch.float32)
    use_cpu_convolutions(layer)
    forbid_convolutions(monkeypatch)
    layer(images)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(AssertionError, match="a convolution ran"):
        layer(images)


@pytest.mark.parametrize("lowered", [False, True], ids=["float32 weights", "bfloat16 weights"])
def test_autocast_computes_in_its_dtype(lowered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, images = layer_and_images({"kernel_size": 3, "padding": 1}, torch.float32)
    if lowered:
        layer.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(images)
        use_cpu_convolutions(layer)
        forbid_convolutions(monkeypatch)
        output = layer(images)
    assert output.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, rtol=0.02, atol=0.02)
    output.sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == layer.weight.dtype


@pytest.mark.parametrize("channels", [{}, {"in_channels": 27, "out_channels": 3}], ids=["few pixels", "few channels"])
def test_no_gradient_is_computed_for_frozen_weights(channels: dict[str, int]) -> None:
    layer, images = layer_and_images({"kernel_size": 3, "padding": 1} | channels)
    use_cpu_convolutions(layer)
    with weights_frozen(layer):
        output = layer(images)
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
def test_3x3_kernels_use_winograd_convolutions(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last).requires_grad_(not frozen)
    images = torch.randn(8 if frozen else 16, 64, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    expected = layer(images)
    use_cpu_convolutions(layer)
    forbid_convolutions(monkeypatch)
    calls: list[bool] = []

    def record(x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, ...], *, cache_weight: bool) -> Tensor:
        calls.append(cache_weight)
        return winograd_conv2d(x, weight, bias, padding, cache_weight=cache_weight)

    monkeypatch.setattr(cpu_conv, "winograd_conv2d", record)
    output = layer(images)
    assert calls == [frozen]
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_a_cpu_with_slow_float32_products_uses_pytorchs_convolutions_in_float32_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_conv, "has_fast_float32_matmul", lambda: False)
    monkeypatch.setattr(cpu_conv, "winograd_conv2d", None)
    calls: list[torch.dtype] = []

    def record(x: Tensor, weight: Tensor, *geometry: tuple[int, ...]) -> Tensor:
        calls.append(x.dtype)
        return im2col_conv2d(x, weight, *geometry)

    monkeypatch.setattr(cpu_conv, "im2col_conv2d", record)
    plain = nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)
    layer = use_cpu_convolutions(copy.deepcopy(plain))
    for side in (8, 2):  # many output pixels, and few
        images = torch.randn(16, 64, side, side).to(memory_format=torch.channels_last)
        torch.testing.assert_close(layer(images), plain(images))
        with torch.autocast("cpu", torch.bfloat16):
            layer(images)
    assert calls == [torch.bfloat16]


@pytest.mark.parametrize(("name", "fast"), [("znver5", False), ("sapphirerapids", True), ("generic", True)])
def test_float32_products_are_slow_on_amd_cpus(name: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llvmlite.binding.get_host_cpu_name", lambda: name)
    assert HAS_FAST_FLOAT32_MATMUL.__wrapped__() is fast


@pytest.mark.parametrize("change", [{"stride": 2}, {"dilation": 2}, {"kernel_size": 5}], ids=str)
def test_other_kernels_do_not_use_winograd_convolutions(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = use_cpu_convolutions(nn.Conv2d(64, 64, **{"kernel_size": 3} | change).to(memory_format=torch.channels_last))
    monkeypatch.setattr(cpu_conv, "winograd_conv2d", None)
    assert layer(torch.randn(16, 64, 12, 12).to(memory_format=torch.channels_last)).shape[1] == 64


@pytest.mark.parametrize("channels", [{}, {"in_channels": 27, "out_channels": 3}, {"in_channels": 64, "out_channels": 64}], ids=str)
def test_compilation_gives_one_graph_with_pytorchs_convolution(channels: dict[str, int]) -> None:
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
