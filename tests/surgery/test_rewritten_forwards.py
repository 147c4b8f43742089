"""Forward passes rewritten to call fused batch norms: what is traced, what is left alone, and what hooks and callers see."""

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dfkd_fast.surgery import BatchNormAct2d, fuse_norm_acts, sharing_copy
from tests.surgery.training_steps import Calls, assert_equal_results, images, randomized, results


def shared() -> nn.Module:
    norm, relu = nn.BatchNorm2d(3), nn.ReLU()
    return nn.Sequential(norm, relu, nn.Conv2d(3, 3, 1), norm, nn.Tanh(), norm, relu)


def test_shared_layers_are_fused_where_they_are_called_in_a_pattern(calls: Calls) -> None:
    network = randomized(shared())
    expected = copy.deepcopy(network)
    assert fuse_norm_acts(network) == 1
    assert_equal_results(network, expected, images(4))
    assert [activation for activation, _, _ in calls] == 2 * ["relu", "none", "relu"]


class Block(nn.Module):
    """A block that must not be fused, or not rewritten, by the kind of its forward pass."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.calls, self.seen = kind, 0, list[Tensor]()
        self.norm, self.relu, self.in_place = nn.BatchNorm2d(3), nn.ReLU(), nn.ReLU(inplace=True)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "tapped":
                y = self.norm(x)
                return self.relu(y) + y
            case "itself":
                y = self.norm(x)
                return self.relu(y + y)
            case "scaled":
                return torch.add(self.norm(x), x, alpha=2).tanh()
            case "residual changed in place":
                y = x.clone()
                y += self.norm(x)
                return y.tanh() + y
            case "input changed before the sum":
                y = x * 1
                with_norm = self.norm(y)
                return with_norm + self.in_place(y).detach()
            case "other mode":
                return F.dropout(self.relu(self.norm(x)), 0.5, self.training)
            case "data":
                return self.relu(self.norm(x)) if x.sum() > -1e9 else x
            case "no gradient":
                with torch.no_grad():
                    y = self.relu(self.norm(x))
                return y + x
            case "checkpoint":
                return checkpoint(lambda z: self.relu(self.norm(z)), x, use_reentrant=False)
            case "autocast":
                with torch.autocast("cpu", enabled=False):
                    return self.relu(self.norm(x))
            case "counting":
                self.calls += 1
                return self.relu(self.norm(x))
            case "storing":
                self.seen.append(x)
                return self.relu(self.norm(x))
            case "constant":
                return self.relu(self.norm(x)) + torch.arange(4)
            case "random":
                return self.relu(self.norm(x)) * random.random()
            case _:
                raise AssertionError(self.kind)


NOT_TRACED = ("other mode", "data", "no gradient", "checkpoint", "autocast", "counting", "storing", "constant", "random")


@pytest.mark.parametrize("kind", ["tapped", "itself", "scaled", "residual changed in place", "input changed before the sum", *NOT_TRACED])
def test_what_cannot_be_fused_is_left_alone(kind: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), Block(kind))
    kinds = [type(module) for module in network.modules()]
    state = random.getstate(), {name: value.clone() for name, value in network.state_dict().items()}
    assert fuse_norm_acts(network) == 0
    assert [type(module) for module in network.modules()] == kinds
    assert all(torch.equal(value, state[1][name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("kind", NOT_TRACED)
def test_other_modules_of_a_network_with_an_untraceable_block_are_fused(kind: str) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.block, self.after = nn.BatchNorm2d(3), Block(kind), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.block(F.silu(self.norm(x)) + x[:, :1]))

    network = randomized(Network())
    expected = copy.deepcopy(network)
    assert fuse_norm_acts(network) == 2
    random.seed(0)
    ours = results(network, images(4))
    random.seed(0)
    theirs = results(expected, images(4))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value)
    assert network.block.calls == expected.block.calls and len(network.block.seen) == len(expected.block.seen)  # type: ignore[union-attr, arg-type]


def test_a_forward_with_optional_arguments_keeps_them_and_its_submodules_are_fused() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.block = nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())

        def forward(self, x: Tensor, with_features: bool = False) -> Any:
            y = F.relu(self.norm(x))
            return (self.block(y), y) if with_features else self.block(y)

    network = randomized(Network())
    expected = copy.deepcopy(network)
    assert fuse_norm_acts(network) == 1
    assert_equal_results(network, expected, images(4))
    assert len(network(images(4), with_features=True)) == 2


def test_an_optional_argument_of_a_submodule_does_not_prevent_the_fusion_of_its_caller() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
            return self.norm(x) if residual is None else F.relu(self.norm(x) + residual)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Optional(), Optional()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.silu(self.first(x)), x)

    network = randomized(Network())
    expected = copy.deepcopy(network)
    assert fuse_norm_acts(network) == 2
    assert_equal_results(network, expected, images(4))


@pytest.mark.parametrize("hooked", ["norm", "activation", "block", "root"])
def test_hooks_see_what_they_saw_before(hooked: str) -> None:
    seen: list[Tensor] = []
    network: Any = randomized(nn.Sequential(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), nn.BatchNorm2d(3), nn.ReLU()))
    module = {"norm": network[1], "activation": network[2], "block": network[0], "root": network}[hooked]
    module.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0].clone(), output.clone())))
    expected = copy.deepcopy(network)
    assert fuse_norm_acts(network) == (1 if hooked in ("norm", "activation") else 2)
    network(images(4))
    expected(images(4))
    assert len(seen) == 4
    torch.testing.assert_close(seen[:2], seen[2:])


def test_hooks_of_blocks_that_are_registered_later_run() -> None:
    network: Any = torchvision.models.resnet18(num_classes=5)
    fuse_norm_acts(network)
    seen: list[torch.Size] = []
    for block in (network.layer1, network.layer2[0], network.layer2[0].downsample):
        block.register_forward_hook(lambda _, inputs, output: seen.append(output.shape))
    network(images().float())
    assert len(seen) == 3


@pytest.mark.parametrize("change", ["hook", "slope", "forward"])
def test_changes_of_an_activation_after_the_fusion_take_effect(change: str) -> None:
    network = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.1))).double()
    expected, fused = copy.deepcopy(network), sharing_copy(network)
    assert fuse_norm_acts(fused, skip_biases=True) == 1
    for each in (expected, network if change == "hook" else fused):
        activation: Any = each[2]  # type: ignore[index]
        if change == "hook":  # of the user's network, whose hooks are those of the copy too
            activation.register_forward_hook(lambda _, __, output: output * 1.5)
        elif change == "slope":
            activation.negative_slope = 0.7
        else:
            activation.forward = torch.sigmoid
    x = images()
    torch.testing.assert_close(fused(x), expected(x))


def test_an_activation_whose_forward_is_replaced_is_not_fused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double()
    network[2].forward = torch.sigmoid
    expected = copy.deepcopy(network)
    assert fuse_norm_acts(network) == 0
    torch.testing.assert_close(network(images()), expected(images()))


def test_assignments_in_place_change_the_same_tensors_and_no_numbers() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            count = x.shape[0]
            before = count
            count += 1
            y = F.relu(self.norm(x)) * before
            alias = y
            y += x
            y *= count
            return alias + y

    network = randomized(Network())
    expected = copy.deepcopy(network)
    assert fuse_norm_acts(network) == 1
    assert_equal_results(network, expected, images(4))


def test_buffers_that_a_forward_pass_changes_change_in_each_call_only() -> None:
    class Network(nn.Module):
        steps: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.register_buffer("steps", torch.zeros(()).double())

        def forward(self, x: Tensor) -> Tensor:
            self.steps.add_(1)
            return F.relu(self.norm(x))

    network = randomized(Network())
    expected = copy.deepcopy(network)
    assert fuse_norm_acts(network) == 1
    assert_equal_results(network, expected, images(4))


def test_a_residual_that_changes_after_the_sum_is_read_before(calls: Calls) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            residual = x * 1
            y = self.norm(x) + residual
            residual.neg_()
            return F.relu(y) + residual

    network = randomized(Network())
    expected = copy.deepcopy(network)
    assert fuse_norm_acts(network) == 1
    assert_equal_results(network, expected, images(4))
    assert calls == 2 * [("relu", True, False)]


def test_a_batch_norm_and_the_activation_of_another_module_are_fused_in_the_module_that_calls_both(calls: Calls) -> None:
    inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    network = randomized(nn.Sequential(inner, nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3))))
    expected = copy.deepcopy(network)
    assert fuse_norm_acts(network, skip_biases=True) == 1
    assert_equal_results(network, expected, images(4))
    assert calls == 2 * [("relu", False, True)]
    assert_equal_results(network[0], expected[0], images(4))  # type: ignore[index]


def compiled_in_place() -> nn.Module:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    network.compile(backend="eager")
    return network


@pytest.mark.parametrize("build", [compiled_in_place, lambda: torch.compile(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), backend="eager")])
def test_compiled_modules_and_scripts_are_left_alone(build: Callable[[], nn.Module]) -> None:
    script = torch.jit.script(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    network = nn.Sequential(build(), script, nn.BatchNorm2d(3), nn.ReLU())
    kinds = [type(module) for module in network[0].modules()]
    assert fuse_norm_acts(network, every_norm=True) == 1
    assert [type(module) for module in network[0].modules()] == kinds
    assert isinstance(network[2], BatchNormAct2d)


def test_batch_norms_without_anything_to_fuse_use_the_kernel_with_every_norm_only(calls: Calls) -> None:
    def build() -> nn.Module:
        return randomized(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Tanh(), Block("data")))

    assert fuse_norm_acts(build()) == 0
    network = build()
    expected = copy.deepcopy(network)
    assert fuse_norm_acts(network, every_norm=True) == 2
    assert_equal_results(network, expected, images(4))
    assert calls == 4 * [("none", False, False)]
