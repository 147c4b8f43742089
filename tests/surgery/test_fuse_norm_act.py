"""Batch norms fused with residual, activation and bias in training: equal results, and networks that stay the user's."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from dfkd_fast.models import GeneratorA, GeneratorB, GeneratorD, GeneratorSettings, build_generator, build_model
from dfkd_fast.surgery import BatchNormAct2d, ConvBeforeNorm, fuse_norm_act, fuse_norm_acts, sharing_copy
from tests.surgery.training_steps import Calls, assert_equal_results, images, randomized


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
