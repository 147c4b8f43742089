"""Batch norms fused with residual, activation and bias in training: equal results, and networks that stay the user's."""

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torchvision.models.vgg import cfgs, make_layers

from dfkd_fast.kernels import batch_norm_act
from dfkd_fast.models import GeneratorA, GeneratorB, GeneratorD, GeneratorSettings, build_generator, build_model
from dfkd_fast.surgery import BatchNormAct2d, ConvBeforeNorm, fuse_norm_act, fuse_norm_acts, sharing_copy

Calls = list[tuple[str, bool, bool]]
"""Activation, and whether residual and input bias were given, of each call of the kernel."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    recorded: Calls = []
    kernel = batch_norm_act

    def recording(x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        residual = arguments[4] if len(arguments) > 4 else None
        recorded.append((keywords["activation"], residual is not None, keywords["input_bias"] is not None))
        return kernel(x, *arguments, **keywords)

    monkeypatch.setattr(fuse_norm_act, "batch_norm_act", recording)
    return recorded


def of_torchvision(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, num_classes=5, **arguments)


def of_timm(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    # Each block's last batch norm, that of the stem, and those between convolutions; not those of shortcuts.
    "resnet18": (of_torchvision("resnet18"), 17),
    "resnet50": (of_torchvision("resnet50"), 49),
    "mobilenet_v2": (of_torchvision("mobilenet_v2"), 45),  # 35 activations and 10 sums
    "mobilenet_v3_small": (of_torchvision("mobilenet_v3_small"), 29),
    "efficientnet_b0": (of_torchvision("efficientnet_b0"), 33),  # stochastic depth precedes its sums
    "densenet121": (of_torchvision("densenet121"), 121),
    "vgg11_bn": (lambda: make_layers(cfgs["A"], batch_norm=True), 8),
    "regnet_y_400mf": (of_torchvision("regnet_y_400mf"), 49),
    "shufflenet_v2_x0_5": (of_torchvision("shufflenet_v2_x0_5"), 37),
    "googlenet": (of_torchvision("googlenet", init_weights=False), 59),  # its own forward pass depends on the mode
    "wrn10_1": (lambda: build_model("wrn10_1", 5, 3), 7),
    "cifar_resnet18": (lambda: build_model("cifar_resnet18", 5, 3), 17),
    "timm resnet10t": (of_timm("resnet10t"), 11),
    "timm efficientnet_lite0": (of_timm("efficientnet_lite0"), 42),
    "timm mobilenetv3_small_050": (of_timm("mobilenetv3_small_050"), 30),
    "timm dla34": (of_timm("dla34"), 33),
    "timm hrnet_w18_small": (of_timm("hrnet_w18_small"), 66),  # its modules take lists
    "timm repvgg_a0": (of_timm("repvgg_a0"), 22),
}


def randomized(network: nn.Module) -> nn.Module:
    """Returns the network in float64 with batch norms whose parameters and statistics differ from their initial values."""
    torch.manual_seed(0)
    for norm in (layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)):
        for tensor, low in ((norm.weight, 0.5), (norm.bias, -0.5), (norm.running_mean, -0.1), (norm.running_var, 0.5)):
            if tensor is not None:
                nn.init.uniform_(tensor, low, low + 1)
    return network.double().train()


def results(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Returns output, gradients and buffers of a step in training mode, and the output in evaluation mode after it."""
    torch.manual_seed(0)
    network.train()
    network.zero_grad()
    x = x.detach().clone().requires_grad_()
    outputs = [leaf for leaf in tree_leaves(network(x.clone())) if isinstance(leaf, Tensor)]
    torch.stack([output.square().sum() for output in outputs]).sum().backward()
    assert x.grad is not None
    found = {"input gradient": x.grad} | {f"output {number}": output.detach() for number, output in enumerate(outputs)}
    found |= {f"{name}.grad": parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
    found |= {name: buffer.clone() for name, buffer in network.named_buffers()}
    network.eval()
    with torch.no_grad():
        found["evaluation"] = network(x.clone())
    network.train()
    return found


def assert_equal_results(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    actual, expected = results(ours, x), results(theirs, x)
    scale = max(float(gradient.abs().max()) for name, gradient in expected.items() if name.endswith("grad"))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():  # gradients of biases before batch norms are rounding errors
        atol = 1e-9 * scale if name.endswith("grad") else 1e-10
        torch.testing.assert_close(actual[name], value, rtol=1e-7, atol=atol, msg=name)


def images(size: int = 32, count: int = 3) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_gradients_and_statistics_are_equal_and_the_users_network_does_not_change(name: str, calls: Calls) -> None:
    build, count = NETWORKS[name]
    network = randomized(build())
    expected = copy.deepcopy(network)
    before = [(type(module), module.training) for module in network.modules()]
    fused = sharing_copy(network)
    assert fuse_norm_acts(fused) == count == sum(isinstance(layer, BatchNormAct2d) for layer in fused.modules())
    assert [(type(module), module.training) for module in network.modules()] == before
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in network.named_modules()]
    assert list(fused.state_dict()) == list(network.state_dict())
    assert all(ours is theirs for ours, theirs in zip(fused.parameters(), network.parameters(), strict=True))
    assert_equal_results(fused, expected, images(64 if name == "googlenet" else 32))
    once = 2 if name == "googlenet" else 0  # its auxiliary classifiers run in training only
    assert len(calls) == 2 * count - once
    assert all(activation != "none" or with_residual for activation, with_residual, _ in calls)


GENERATORS: dict[str, Callable[[], nn.Module]] = {
    "A": lambda: GeneratorA(6, 3, 16, width=4),
    "B": lambda: GeneratorB(6, 3, 16, width=4),
    "D": lambda: GeneratorD(6, 16, [0.5] * 3, [0.2] * 3, width=4),
    "spectral norm": lambda: build_generator(GeneratorSettings(latent_dim=6, width=4, spectral_norm=True), 3, 16),
}


@pytest.mark.parametrize(("on_gpu", "counts"), [(False, {"A": 2, "B": 4, "D": 2, "spectral norm": 2}), (True, {})])
@pytest.mark.parametrize("name", GENERATORS)
def test_generators_are_fused_where_their_body_is_called(name: str, on_gpu: bool, counts: dict[str, int], calls: Calls) -> None:
    network: Any = randomized(GENERATORS[name]())
    expected = copy.deepcopy(network)
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    count = fuse_norm_acts(network, every_norm=on_gpu, skip_biases=on_gpu)
    assert count == counts.get(name, len(norms))
    assert type(network).forward is type(expected).forward  # generate() replaces the head of our generators
    z = torch.randn(5, 6).double()
    assert_equal_results(network, expected, z)
    assert_equal_results(network.body, expected.body, z)
    assert sum(activation == "leaky_relu" for activation, _, _ in calls) == 4 * (3 if name == "B" else 2) + 4 * (name == "B")
    assert sum(with_bias for _, _, with_bias in calls) == (8 if on_gpu and name != "B" else 0)


def test_a_stage_with_checkpoints_is_left_alone() -> None:
    network = GeneratorD(6, 16, [0.5] * 3, [0.2] * 3, width=4, checkpointing=True)
    kinds = [type(module) for module in network.modules()]
    assert fuse_norm_acts(network) == 0
    assert [type(module) for module in network.modules()] == kinds


class Sums(nn.Module):
    """Every form of a sum and an activation after a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if index == 0 else 4, 4, 3, padding=1, bias=index % 2 == 0) for index in range(8))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(8))
        self.hardswish, self.identity, self.leaky = nn.Hardswish(inplace=True), nn.Identity(), nn.LeakyReLU(0.3, inplace=True)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.convs[0](x)), inplace=True)
        z = self.leaky(self.identity(self.norms[1](self.convs[1](y))) + y)
        y = F.leaky_relu(self.norms[2](self.convs[2](z)), 0.2)
        y = self.hardswish(z + self.norms[3](self.convs[3](y)))
        z = self.norms[4](self.convs[4](y))
        z += y
        y = F.relu6(torch.add(self.norms[5](self.convs[5](z)), z))
        z = F.silu(self.norms[6](self.convs[6](y)))
        y = self.norms[7](self.convs[7](z)).add(y).relu_()
        return self.head(y.mean((2, 3)))


def test_every_form_of_sums_and_activations_is_fused(calls: Calls) -> None:
    network = randomized(Sums())
    expected = copy.deepcopy(network)
    assert fuse_norm_acts(network) == 8
    assert_equal_results(network, expected, images(8))
    forms = ["relu", "leaky_relu", "leaky_relu", "hardswish", "none", "relu6", "silu", "relu"]
    residuals = [False, True, False, True, True, True, False, True]
    assert calls == 2 * [(activation, residual, False) for activation, residual in zip(forms, residuals, strict=True)]


def test_a_skipped_bias_has_no_gradient_in_training_and_counts_in_the_running_mean_and_in_evaluation(calls: Calls) -> None:
    network: Any = randomized(Sums())
    expected = copy.deepcopy(network)
    assert fuse_norm_acts(network, skip_biases=True) == 8
    assert [isinstance(conv, ConvBeforeNorm) for conv in network.convs] == 4 * [True, False]
    for _ in range(2):  # before and after steps that change the biases
        assert_equal_results(network, expected, images(8))
        with torch.no_grad():
            for each in (network, expected):
                for parameter in each.parameters():
                    parameter.add_(0.1)
    assert [with_bias for _, _, with_bias in calls] == 16 * [True, False]
    network.eval()
    network.zero_grad()
    expected.zero_grad()
    for each in (network, expected):
        each.eval()(images(8)).sum().backward()
    torch.testing.assert_close(network.convs[0].bias.grad, expected.convs[0].bias.grad)


def test_a_layer_called_on_its_own_computes_what_it_did_before() -> None:
    network: Any = randomized(Sums())
    expected = copy.deepcopy(network)
    fuse_norm_acts(network, skip_biases=True)
    x = images(8)
    torch.testing.assert_close(network.convs[0](x), expected.convs[0](x), rtol=0, atol=0)
    y = expected.convs[0](x).detach()
    torch.testing.assert_close(network.norms[0](y), expected.norms[0](y), rtol=0, atol=0)


def test_a_replaced_bias_parameter_is_the_one_that_is_added() -> None:
    network: Any = randomized(Sums())
    expected = copy.deepcopy(network)
    fuse_norm_acts(network, skip_biases=True)
    for each in (network, expected):
        each.convs[0].bias = nn.Parameter(torch.arange(4.0).double())
    assert_equal_results(network, expected, images(8))


def test_a_deep_copy_is_independent_of_the_network(calls: Calls) -> None:
    network = randomized(Sums())
    expected = copy.deepcopy(network)
    fuse_norm_acts(network, skip_biases=True)
    copied = copy.deepcopy(network)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.zero_()
    assert_equal_results(copied, expected, images(8))
    assert len(calls) == 16


@pytest.mark.parametrize("bias_of", [nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.ConvTranspose2d(3, 4, 3, stride=2)])
def test_biases_of_padded_and_transposed_convolutions_are_skipped(bias_of: nn.Module, calls: Calls) -> None:
    network = randomized(nn.Sequential(copy.deepcopy(bias_of), nn.BatchNorm2d(4)))
    expected = copy.deepcopy(network)
    assert fuse_norm_acts(network, skip_biases=True) == 1
    assert_equal_results(network, expected, images(8))
    assert calls == 2 * [("none", False, True)]


class Scaled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_biases_that_something_else_uses_are_not_skipped() -> None:
    class Tapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return F.relu(self.norm(y)) + y

    hooked = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    hooked[0].register_forward_hook(lambda *_: None)
    for network in (Tapped(), hooked, nn.Sequential(Scaled(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())):
        expected = copy.deepcopy(randomized(network))
        assert fuse_norm_acts(network, skip_biases=True) == 1
        assert not any(isinstance(layer, ConvBeforeNorm) for layer in network.modules())
        assert_equal_results(network, expected, images(4))


OPTIONS: list[dict[str, Any]] = [
    *({"momentum": None}, {"track_running_stats": False}, {"affine": False}, {"momentum": 0.0}),
    {"momentum": None, "track_running_stats": False},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_batch_norms_of_every_kind_are_fused(options: dict[str, Any]) -> None:
    network = randomized(nn.Sequential(nn.BatchNorm2d(3, **options), nn.ReLU(), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, **options)))
    expected = copy.deepcopy(network)
    assert fuse_norm_acts(network, every_norm=True, skip_biases=True) == 2
    for _ in range(2):
        assert_equal_results(network, expected, images(4))


def test_statistics_that_are_no_longer_tracked_do_not_change() -> None:
    network: Any = randomized(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    network[0].track_running_stats = False
    expected = copy.deepcopy(network)
    assert fuse_norm_acts(network) == 1
    assert_equal_results(network, expected, images(4))
    assert int(network[0].num_batches_tracked) == 0


def test_frozen_batch_norms_in_evaluation_mode_stay_frozen() -> None:
    network: Any = randomized(Sums())
    fused: Any = copy.deepcopy(network)
    fuse_norm_acts(fused)
    for each in (network, fused):
        each.norms.eval()
    torch.testing.assert_close(fused(images(8)), network(images(8)))
    assert torch.equal(fused.norms[0].running_mean, network.norms[0].running_mean)
    assert fused.training and not fused.norms[0].training


@pytest.mark.parametrize("kind", ["broadcast", "dtype", "number"])
def test_a_residual_of_another_shape_or_dtype_is_added_as_pytorch_does(kind: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            match kind:
                case "broadcast":
                    return torch.relu(self.norm(x) + x.mean((2, 3), keepdim=True))
                case "dtype":
                    return torch.relu(self.norm(x) + x.half())
                case _:
                    return torch.relu(self.norm(x) + x.shape[0])

    network = randomized(Block()).to(torch.float32 if kind == "dtype" else torch.float64)
    expected = copy.deepcopy(network)
    assert fuse_norm_acts(network) == 1
    x = images(4).to(next(network.parameters()).dtype)
    assert_equal_results(network, expected, x)
    assert network(x).dtype == expected(x).dtype


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Tanh])
def test_timms_layer_of_batch_norm_and_activation_is_fused_as_one(act: Any, calls: Calls) -> None:
    from timm.layers.norm_act import BatchNormAct2d as TimmLayer

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = TimmLayer(3, act_layer=act, inplace=False), TimmLayer(3, apply_act=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.last(self.first(x)) + x)

    network = randomized(Block())
    expected = copy.deepcopy(network)
    assert fuse_norm_acts(network) == (1 if act is nn.Tanh else 2)
    assert_equal_results(network, expected, images(4))
    assert set(calls) == {("relu", True, False)} | ({(act.__name__.lower(), False, False)} if act is not nn.Tanh else set())


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


def test_a_compiled_copy_has_one_graph_and_equal_outputs() -> None:
    network = randomized(Sums())
    expected = copy.deepcopy(network)
    fuse_norm_acts(network, every_norm=True, skip_biases=True)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images(8)), expected(images(8)))


@pytest.fixture
def process_group() -> Iterator[None]:
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("chosen", [False, True])
def test_synchronized_batch_norms_pass_their_process_group_in_training(chosen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    group = torch.distributed.new_group([0]) if chosen else None
    network: Any = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    network = nn.SyncBatchNorm.convert_sync_batchnorm(network, group)
    assert fuse_norm_acts(network, every_norm=chosen) == 1  # a network with a group is not traced, since it cannot be copied
    groups: list[Any] = []

    def recording(x: Tensor, *_: Any, **keywords: Any) -> Tensor:
        groups.append(keywords["group"])
        return x

    monkeypatch.setattr(fuse_norm_act, "batch_norm_act", recording)
    network(images(4).float())
    network.eval()(images(4).float())
    assert groups == [group if chosen else torch.distributed.group.WORLD, None]
