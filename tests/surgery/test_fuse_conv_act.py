"""Convolutions fused with residual and activation: equal logits, gradients and statistics, for networks of every kind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast.models import build_model
from dfkd_fast.surgery import ConvAct2d, FoldingError, Observer, fold, freeze, fuse_conv_acts, has_running_statistics

SIZE = 32


class Block(nn.Module):
    """A sum of two convolutions with different biases, a sum with a tensor that is used again, and a sum that is not activated."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.shortcut = (nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(3, 6, 1))
        self.third, self.fourth = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.Conv2d(6, 6, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(5))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.first(x)))
        y = torch.relu(self.norms[1](self.second(y)) + self.norms[2](self.shortcut(x)))
        y = (y + self.norms[3](self.third(y))).relu()
        y = self.norms[4](self.fourth(y)) + y
        return self.head(F.silu(y).mean((2, 3)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "sums of every kind": (Block, 4),
    "ResNet": (lambda: build_model("cifar_resnet18", 10, 3), 17),  # all but the convolutions of three shortcuts
    "pre-activation": (lambda: build_model("wrn10_1", 10, 3), 6),
    "without batch norms": (lambda: build_model("lenet5", 10, 3), 3),
    "ReLU6 and sums without activation": (lambda: build_model("torchvision:mobilenet_v2", 10, 3), 45),
    "hard-swish, squeeze and excitation": (lambda: build_model("torchvision:mobilenet_v3_small", 10, 3), 38),
    "timm's blocks": (lambda: build_model("timm:resnet10t", 10, 3), 11),
}


def trained(build: Callable[[], nn.Module]) -> nn.Module:
    """Returns a frozen teacher with non-trivial running statistics, folded if it has batch norms."""
    torch.manual_seed(0)
    network = freeze(build())
    for norm in (layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.normal_(0, 0.1)
    return fold(network) if any(map(has_running_statistics, network.modules())) else network


def images(size: int = SIZE) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def result(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    y = function(x)
    return y, torch.autograd.grad(y.square().sum(), x)[0]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.detach().abs().max()) + 1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_and_input_gradients_are_equal_in_float64(name: str) -> None:
    build, count = NETWORKS[name]
    network = trained(build).double()
    fused, fusions = fuse_conv_acts(network, images().double())
    assert fusions == count == sum(isinstance(layer, ConvAct2d) for layer in fused.modules())
    for ours, theirs in zip(result(fused, images().double()), result(network, images().double()), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "without batch norms"])
def test_observed_statistics_and_features_and_their_gradients_are_equal(name: str) -> None:
    network = trained(NETWORKS[name][0])
    fused, _ = fuse_conv_acts(network, images())
    observers = [Observer(each, statistics=True, features=True) for each in (fused, network)]
    observations = [observer(images()) for observer in observers]

    def distances(observer: Observer) -> Callable[[Tensor], Tensor]:
        def of_statistics(x: Tensor) -> Tensor:
            seen = observer(x)
            assert seen.statistics is not None and seen.running is not None and seen.features is not None
            return torch.cat([(seen.statistics - seen.running).norm(dim=(0, 2)).sort().values, seen.features.flatten()])

        return of_statistics

    ours, theirs = observations
    assert ours.statistics is not None and theirs.statistics is not None and ours.statistics.shape == theirs.statistics.shape
    (value, gradient), (expected, expected_gradient) = (result(distances(observer), images()) for observer in observers)
    assert_close(value, expected)
    scale = float(expected_gradient.abs().max())
    wrong = (gradient - expected_gradient).abs() > 1e-3 * scale  # a ReLU6 may round to either side of its corners
    assert wrong.float().mean() < 1e-3 and float((gradient - expected_gradient).norm() / expected_gradient.norm()) < 1e-2
    assert_close(ours.logits, theirs.logits)


def test_of_two_convolutions_in_a_sum_one_adds_the_bias_of_both() -> None:
    network: Any = trained(Block)
    fused: Any = fuse_conv_acts(network, images())[0]
    assert fused.shortcut.bias is None and not isinstance(fused.shortcut, ConvAct2d)
    torch.testing.assert_close(fused.second.bias, network.second.bias + network.shortcut.bias)
    assert network.shortcut.bias is not None  # the original is unchanged


def test_the_copy_shares_weights_and_the_original_is_unchanged() -> None:
    network = trained(Block)
    before = [(name, type(layer)) for name, layer in network.named_modules()]
    fused: Any = fuse_conv_acts(network, images())[0]
    assert fused.first.weight is network.first.weight  # type: ignore[union-attr]
    assert [(name, type(layer)) for name, layer in network.named_modules()] == before


class Special(nn.Module):
    """Convolutions that must not be fused, by the kind of what follows them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, 4, 3, padding="same" if kind == "padding" else 1, padding_mode="reflect" if kind == "reflect" else "zeros")
        self.other = nn.Conv2d(3, 4, 3, padding=1)
        self.act, self.in_place = nn.ReLU(), nn.ReLU(inplace=True)
        if kind == "hook":
            self.act.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        match self.kind:
            case "tapped":
                y = torch.cat([y, self.act(y)], dim=1)
            case "called twice":
                y = self.act(y) + self.act(self.conv(x.flip(-1)))
            case "broadcast":
                y = self.act(y.mean((2, 3), keepdim=True) * y + y.sum((2, 3), keepdim=True))
            case "number":
                y = self.act(y + 1.0)
            case "scaled":
                y = self.act(torch.add(y, x.sum(1, keepdim=True).expand_as(y), alpha=2))
            case "itself":
                y = self.act(y + y)
            case "changed in place":
                z = x.mean(1, keepdim=True).expand_as(y).clone()
                z.add_(y)
                y = z * 2
            case "input changed in place":
                y = y + torch.relu_(x.mean(1, keepdim=True).expand_as(y).contiguous().mul_(x.mul_(0.5).mean()))
            case "input changed by a module":
                y = y + self.in_place(x).mean(1, keepdim=True).expand_as(y).contiguous()
            case "bias read":
                y = self.act(y + self.other(x)) + self.conv.bias[:, None, None] + self.other.bias[:, None, None]  # type: ignore[index]
            case "slope":
                y = F.leaky_relu(y)
            case _:
                y = self.act(y)
        return y.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize(
    "kind",
    [
        *("tapped", "called twice", "broadcast", "number", "scaled", "itself", "slope", "padding", "reflect", "hook", "bias read"),
        *("changed in place", "input changed in place", "input changed by a module"),
    ],
)
def test_what_cannot_be_fused_is_left_alone(kind: str) -> None:
    torch.manual_seed(0)
    network = freeze(Special(kind))
    fused, count = fuse_conv_acts(network, images(8))
    assert count == 0
    with torch.no_grad():  # PyTorch cannot differentiate some of the originals
        torch.testing.assert_close(fused(images(8)), network(images(8)))


def test_an_identity_that_is_called_by_keyword_is_removed() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.identity = nn.Conv2d(3, 4, 3), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.identity(input=self.conv(x))).mean((2, 3))

    network = freeze(Keyword())
    fused, count = fuse_conv_acts(network, images(8))
    assert count == 1
    torch.testing.assert_close(fused(images(8)), network(images(8)))


def test_a_residual_that_changes_after_the_sum_is_read_before() -> None:
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            residual = x * 1
            y = self.conv(x) + residual
            residual.neg_()
            return F.relu(y) + residual

    network = freeze(Changed())
    fused, count = fuse_conv_acts(network, images(8))
    assert count == 1
    torch.testing.assert_close(fused(images(8)), network(images(8)))


def test_float32_weights_work_under_autocast() -> None:
    network = trained(NETWORKS["ReLU6 and sums without activation"][0])
    fused, _ = fuse_conv_acts(network, images())
    with torch.autocast("cpu", torch.bfloat16):
        assert float((fused(images()) - network(images())).abs().max()) < 0.05 * float(network(images()).abs().max()) + 1e-6


def test_a_network_that_cannot_be_traced_is_an_error_of_one_line() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(FoldingError, match="Branching cannot be traced: "):
        fuse_conv_acts(Branching(), images())


def test_inputs_of_another_dtype_are_cast_to_that_of_the_weights() -> None:
    network = trained(Block)
    fused, _ = fuse_conv_acts(network.to(torch.bfloat16), images().bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fused(images()).float(), network(images()).float(), rtol=0.05, atol=0.05)
