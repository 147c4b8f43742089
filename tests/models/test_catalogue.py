import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import ResNet

from dfkd_fast.errors import DfkdError
from dfkd_fast.models import LeNet5, WideResNet, build_model


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lenet5", LeNet5),
        ("lenet5_half", LeNet5),
        ("cifar_resnet18", ResNet),
        ("cifar_resnet34", ResNet),
        ("wrn10_1", WideResNet),
        ("wrn40_2", WideResNet),
    ],
)
def test_a_papers_network_is_built_by_its_name(name: str, kind: type[nn.Module]) -> None:
    with torch.device("meta"):
        assert type(build_model(name, 10, 1)) is kind


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("squeezenet1_1", "torchvision"),
        ("resnet18", "torchvision"),
        ("torchvision:resnet18", "torchvision"),
        ("timm:resnet18", "timm"),
        ("resnet10t", "timm"),
    ],
)
def test_other_names_come_from_torchvision_first_unless_a_library_is_named(name: str, library: str) -> None:
    with torch.device("meta"):
        network = build_model(name, 7, 3)
    assert type(network).__module__.split(".")[0] == library
    assert network(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 7)


def test_a_timm_network_supports_any_number_of_channels() -> None:
    with torch.device("meta"):
        network = build_model("timm:resnet10t", 7, 1)
    assert network(torch.empty(2, 1, 64, 64, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet18", "torchvision:resnet18"])
def test_a_torchvision_network_with_other_than_3_channels_is_refused_with_an_alternative(name: str) -> None:
    with pytest.raises(DfkdError, match=rf"{name}.* take 3 channels, not 1; .*timm:resnet18"):
        build_model(name, 10, 1)


@pytest.mark.parametrize("name", ["wrn39_2", "wrn4_2", "wrn16_0", "wrn0_1"])
def test_an_impossible_depth_or_width_of_a_wide_resnet_is_refused(name: str) -> None:
    with pytest.raises(DfkdError, match=rf"model '{name}': .*depth of a wide ResNet must be 6n \+ 4"):
        build_model(name, 10, 3)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("lenet", "lenet5"),
        ("cifar_resnet16", "cifar_resnet18"),
        ("wrn40-2", "wrn40_2"),
        ("resnet18_", "resnet18"),
        ("timm:resnet_50", "resnet50"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name: str, suggestion: str) -> None:
    with pytest.raises(DfkdError, match=rf"unknown model '{name}': did you mean '{suggestion}'\?"):
        build_model(name, 10, 3)


def test_an_unknown_name_lists_each_choice_once() -> None:
    with pytest.raises(DfkdError) as caught:
        build_model("resnet18_", 10, 3)
    choices = str(caught.value).partition("must be one of ")[2].split(", ")
    assert set(choices) >= {"lenet5", "lenet5_half", "cifar_resnet18", "cifar_resnet34", "resnet18"}
    assert len(choices) == len(set(choices))


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_networks_{tmp_path.parent.name.replace('-', '_')}_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(
        "from torch import nn\n"
        "def tiny(num_classes: int) -> nn.Module: return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))\n"
        "def text(num_classes: int) -> str: return 'not a network'\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return name


def test_a_users_function_is_imported_from_the_working_folder(user_module: str) -> None:
    network = build_model(f"{user_module}:tiny", 7, 1)
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 7)


@pytest.mark.parametrize(
    ("function", "message"), [("nothing", "has no attribute 'nothing'"), ("text", "must return a torch.nn.Module, not str")]
)
def test_a_users_function_that_does_not_return_a_network_is_named(user_module: str, function: str, message: str) -> None:
    with pytest.raises(DfkdError, match=f"model '{user_module}:{function}'.* {message}"):
        build_model(f"{user_module}:{function}", 7, 1)


@pytest.mark.parametrize(
    "name", ["no_such_module_at_all:build", "./networks:build", ".networks:build", "math:pi", "timm:resnet18.no_such_tag"]
)
def test_an_error_for_an_unresolvable_name_contains_the_name(name: str) -> None:
    with pytest.raises(DfkdError, match=name):
        build_model(name, 7, 3)
