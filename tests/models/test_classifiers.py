import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18, resnet34

from dfkd_fast.models import LeNet5, WideResNet, build_model, cifar_resnet


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def wide_resnet_parameters(depth: int, width: int, classes: int, channels: int) -> int:
    """Counted from table 1 of arXiv 1605.07146."""
    total, before = channels * 16 * 9, 16
    for after in (16 * width, 32 * width, 64 * width):
        for block in range((depth - 4) // 6):
            total += 2 * before + before * after * 9 + 2 * after + after * after * 9
            total += before * after if block == 0 and before != after else 0
            before = after
    return total + 2 * before + (before + 1) * classes


# The named totals are those of the literature.
@pytest.mark.parametrize(
    ("name", "classes", "channels", "expected"),
    [
        ("lenet5", 10, 1, 61_706),
        ("lenet5_half", 10, 1, 3 * 26 + 8 * 76 + 60 * 201 + 42 * 61 + 10 * 43),
        ("lenet5", 7, 3, 61_706 + 2 * 6 * 25 - 3 * 85),
        ("cifar_resnet18", 10, 3, 11_173_962),
        ("cifar_resnet34", 10, 3, 21_282_122),
        ("cifar_resnet34", 100, 1, 21_282_122 + 90 * 513 - 2 * 64 * 9),
        ("wrn40_2", 10, 3, 2_243_546),
        ("wrn16_1", 10, 3, 175_066),
        ("wrn16_2", 10, 3, 691_674),
        ("wrn40_2", 10, 3, wide_resnet_parameters(40, 2, 10, 3)),
        ("wrn22_3", 100, 1, wide_resnet_parameters(22, 3, 100, 1)),
    ],
)
def test_parameters_of_the_papers_networks(name: str, classes: int, channels: int, expected: int) -> None:
    with torch.device("meta"):
        network = build_model(name, classes, channels)
    assert parameters(network) == expected
    assert network(torch.empty(2, channels, 32, 32, device="meta")).shape == (2, classes)


def lenet5(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    weights = iter(state.values())
    for _ in range(2):
        x = F.max_pool2d(F.conv2d(x, next(weights), next(weights)).relu(), 2)
    x = F.conv2d(x, next(weights), next(weights)).relu().flatten(1)
    x = F.linear(x, next(weights), next(weights)).relu()
    return F.linear(x, next(weights), next(weights))


@pytest.mark.parametrize("widths", [(6, 16, 120, 84), (3, 8, 60, 42)])
def test_lenet5_computes_what_the_paper_describes(widths: tuple[int, int, int, int]) -> None:
    torch.manual_seed(0)
    network, x = LeNet5(10, 1, widths).double(), torch.randn(3, 1, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(network(x), lenet5(x, network.state_dict()))


@pytest.mark.parametrize(("blocks", "original"), [((2, 2, 2, 2), resnet18), ((3, 4, 6, 3), resnet34)])
def test_the_cifar_resnet_is_torchvisions_with_a_stem_that_keeps_the_resolution(
    blocks: tuple[int, int, int, int], original: type[nn.Module]
) -> None:
    torch.manual_seed(0)
    network: Any = cifar_resnet(blocks, 5, 1).eval()
    x = torch.randn(2, 1, 8, 8)
    stem = network.maxpool(network.relu(network.bn1(network.conv1(x))))
    assert stem.shape == (2, 64, 8, 8)
    twin = original(num_classes=5).eval()
    twin.conv1 = copy.deepcopy(network.conv1)
    twin.load_state_dict(network.state_dict())
    twin.conv1, twin.maxpool = nn.Identity(), nn.Identity()
    torch.testing.assert_close(network(x), twin(network.conv1(x)))
    torch.testing.assert_close(network.conv1(x), F.conv2d(x, network.conv1.weight, padding=1))


def wide_resnet(x: Tensor, network: nn.Module, depth: int, width: int) -> Tensor:
    """Reference forward pass of arXiv 1605.07146 with batch statistics, using the network's weights in order."""
    weights = iter(list(network.parameters()))

    def normalized(x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, next(weights), next(weights), training=True).relu()

    x = F.conv2d(x, next(weights), padding=1)
    for stride, before in ((1, 16), (2, 16 * width), (2, 32 * width)):
        for block in range((depth - 4) // 6):
            strided = stride if block == 0 else 1
            activated = normalized(x)
            residual = F.conv2d(normalized(F.conv2d(activated, next(weights), stride=strided, padding=1)), next(weights), padding=1)
            projects = block == 0 and residual.shape[1] != before
            x = residual + (F.conv2d(activated, next(weights), stride=strided) if projects else x)
    return F.linear(normalized(x).mean((2, 3)), next(weights), next(weights))


@pytest.mark.parametrize(("depth", "width"), [(10, 1), (16, 1), (10, 2), (22, 3)])
def test_the_wide_resnet_computes_what_the_paper_describes(depth: int, width: int) -> None:
    torch.manual_seed(0)
    network, x = WideResNet(depth, width, 5, 2).double(), torch.randn(3, 2, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(network(x), wide_resnet(x, network, depth, width))


@pytest.mark.parametrize("network", [cifar_resnet((1, 1, 1, 1)), WideResNet(16, 2)])
def test_convolutions_have_kaiming_fan_out_initialization(network: nn.Module) -> None:
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 400:
            expected = (2 / (layer.out_channels * layer.kernel_size[0] ** 2)) ** 0.5
            assert layer.weight.std().item() == pytest.approx(expected, rel=4 / layer.weight.numel() ** 0.5)
