import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.parametrizations import spectral_norm

from dfkd_fast.models import build_model
from dfkd_fast.models.segmenters import build_segmenter
from dfkd_fast.surgery import find_heads, freeze, get_logits, in_float32, lower_precision

SIZE = 32


class Cosine(nn.Module):
    """A user's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight))


class Scaled(nn.Module):
    """Registers its body after its classifier, has a parameter that belongs to no layer, and modifies its input in place."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(1, 3, 1, 1))
        self.classifier = head
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        return 16 * self.classifier(self.body(x.add_(self.offset)))


class TwoHeads(nn.Module):
    """A mean of two classifiers, and an auxiliary one that is called last."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, stride=4), nn.Flatten())
        self.one, self.other, self.auxiliary = (nn.Linear(8 * 64, 5) for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body(x)
        logits = (self.one(features) + self.other(features.relu())) / 2
        return {"out": logits, "aux": self.auxiliary(features)}


class TwoHeadsInTuple(TwoHeads):
    """Returns the outputs as a tuple."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        outputs = super().forward(x)
        return outputs["out"], outputs["aux"]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "LeNet-5": (lambda: build_model("lenet5", 5, 3), ["11"]),
    "wide ResNet": (lambda: build_model("wrn10_1", 5, 3), ["classifier"]),
    "small FCN": (lambda: build_model("small_fcn4", 5, 3), ["9"]),
    "LR-ASPP": (
        lambda: build_segmenter("lraspp_mobilenet_v3_large", 5, 3),
        ["classifier.high_classifier", "classifier.low_classifier"],
    ),
    "no linear layer": (lambda: nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten()), ["0"]),
    "user's layer": (lambda: Scaled(Cosine()), ["classifier"]),
    "parametrized": (lambda: Scaled(spectral_norm(nn.Linear(8, 5))), ["classifier"]),
    "two heads": (TwoHeads, ["one", "other"]),
    "tuple": (TwoHeadsInTuple, ["one", "other"]),
}
networks = pytest.mark.parametrize(("build", "heads"), NETWORKS.values(), ids=NETWORKS.keys())


def images() -> Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def lowered() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@networks
def test_the_heads_are_the_last_layers_before_the_logits(build: Callable[[], nn.Module], heads: list[str]) -> None:
    network = build()
    before, x = copy.deepcopy(network.state_dict()), images()
    layers = find_heads(network, x)
    assert sorted(name for name, layer in network.named_modules() if any(layer is head for head in layers)) == heads
    assert torch.equal(x, images())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in network.modules())


@networks
def test_logits_equal_those_of_a_float32_head_on_the_same_features(build: Callable[[], nn.Module], heads: list[str]) -> None:
    torch.manual_seed(0)
    network = freeze(build())
    inputs: dict[str, Tensor] = {}
    hooks = [
        network.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]})) for name in heads
    ]
    with lowered(), in_float32(find_heads(network, images())):
        logits = get_logits(network(images()))
        rounded = {name: value.clone() for name, value in inputs.items()}
    for hook in hooks:
        hook.remove()
    # The same network without autocast, with the recorded inputs of its heads.
    for name in heads:
        network.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: (rounded[name].float(),))
    assert logits.dtype == torch.float32
    assert {value.dtype for value in rounded.values()} <= {torch.bfloat16, torch.float32}
    torch.testing.assert_close(logits, get_logits(network(images())), rtol=1e-5, atol=1e-6)


@networks
def test_lower_precision_keeps_the_heads_of_a_frozen_network_in_float32(build: Callable[[], nn.Module], heads: list[str]) -> None:
    torch.manual_seed(0)
    network = freeze(build())
    names = network.state_dict().keys()
    with lowered(), in_float32(find_heads(network, images())):
        expected = get_logits(network(images()))
    cast = lower_precision(copy.deepcopy(network), torch.bfloat16, images())
    assert cast.state_dict().keys() == names
    for name, layer in cast.named_modules():
        if type(layer) in (nn.Conv2d, nn.Linear):
            assert layer.weight.dtype == torch.bfloat16, name
    assert all(parameter.dtype == torch.float32 for name in heads for parameter in cast.get_submodule(name).parameters())
    with lowered():
        logits = get_logits(cast(images()))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)


@networks
def test_in_float32_restores_a_users_network(build: Callable[[], nn.Module], heads: list[str]) -> None:
    network = build()
    before = [(name, type(module), set(vars(module))) for name, module in network.named_modules()]
    layers = find_heads(network, images())
    with in_float32(layers):
        assert network.state_dict().keys() == build().state_dict().keys()
        assert isinstance(network.get_submodule(heads[0]), before[[name for name, *_ in before].index(heads[0])][1])
    with pytest.raises(ZeroDivisionError), in_float32([*layers, *layers]):
        raise ZeroDivisionError
    assert [(name, type(module), set(vars(module))) for name, module in network.named_modules()] == before
    if "parametrizations" not in str(network):  # PyTorch cannot pickle parametrized modules
        torch.save(network, io.BytesIO())


@pytest.mark.parametrize("name", ["wrn10_1", "small_fcn4"])
def test_heads_compute_in_float32_under_cuda_autocast(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with FakeTensorMode(), torch.device("cuda"):
        student, teacher, x = build_model(name, 5, 3), freeze(build_model(name, 5, 3)), torch.randn(2, 3, SIZE, SIZE)
        heads, dtypes = find_heads(student, x), list[torch.dtype]()
        for head in [*heads, *find_heads(teacher, x)]:
            head.register_forward_hook(lambda _, args, logits: dtypes.append(logits.dtype))
        lower_precision(teacher, torch.bfloat16, x)
        dtypes.clear()
        for query in ("is_available", "is_bf16_supported"):  # otherwise autocast disables itself
            monkeypatch.setattr(torch.cuda, query, lambda: True)
        with torch.autocast("cuda", torch.bfloat16):
            student(x)
            with in_float32(heads):
                logits = [student(x), teacher(x)]
    assert dtypes == [torch.bfloat16, torch.float32, torch.float32]
    assert all(each.dtype == torch.float32 and each.device.type == "cuda" for each in logits)


def test_a_head_in_float32_is_compiled_once_into_one_graph() -> None:
    torch._dynamo.reset()
    network, counter = Scaled(nn.Linear(8, 5)).eval(), CompileCounter()
    layers = find_heads(network, images())
    with lowered(), in_float32(layers):
        expected = network(images())
    compiled = torch.compile(network, backend=counter, fullgraph=True)
    for _ in range(3):
        with lowered(), in_float32(layers):
            assert torch.equal(compiled(images()), expected)
    assert counter.frame_count == 1


class Summing(nn.Module):
    """A user's layer that takes a list of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 8))

    def forward(self, *, features: list[Tensor]) -> Tensor:
        return F.linear(torch.stack(features).sum(0), self.weight)


HEADS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "by keyword": (lambda: nn.Linear(8, 5), lambda head, x: head(input=x)),
    "with a list": (Summing, lambda head, x: head(features=[x, 2 * x])),
    "with two tensors": (lambda: nn.Bilinear(8, 8, 5), lambda head, x: head(x, 2 * x)),
}


@pytest.mark.parametrize("signature", HEADS)
def test_a_head_may_have_any_signature(signature: str) -> None:
    build, call = HEADS[signature]

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.head = build()

        def forward(self, x: Tensor) -> Tensor:
            return call(self.head, self.body(x))

    network = Network()
    heads = find_heads(network, images())
    assert heads == [network.head]
    with torch.autocast("cpu", torch.bfloat16):
        features = network.body(images())
        with in_float32(heads):
            logits = network(images())
    assert features.dtype == torch.bfloat16
    torch.testing.assert_close(logits, call(network.head, features.float()), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_a_scripted_network_has_no_heads() -> None:
    network = torch.jit.trace(build_model("lenet5", 5, 3).eval(), images())
    assert find_heads(network, images()) == []
