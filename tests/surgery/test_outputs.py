"""Extraction of logits from any kind of output, and forward passes without side effects."""

import copy
import io
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from dfkd_fast import DfkdError
from dfkd_fast.surgery import dry_run, extract_logits, fold, freeze, get_logits, logits_only

Outputs = namedtuple("Outputs", ["features", "logits"])


class ModelOutput(OrderedDict[str, Any]):
    """Like transformers' ModelOutput, a dict whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


@dataclass
class Output:
    logits: Tensor
    other: Tensor


@dataclass(slots=True)
class Slotted:
    logits: Tensor


LOGITS, OTHER = torch.randn(2, 5), torch.randn(2, 8)
OUTPUTS: dict[str, Any] = {
    "tensor": LOGITS,
    "tuple": (LOGITS, OTHER),
    "list": [LOGITS, OTHER],
    "tuple without a loss": (None, LOGITS, OTHER),
    "tuple with a dict": ({"aux": OTHER}, LOGITS),
    "out": {"aux": OTHER, "out": LOGITS},
    "logits": {"loss": OTHER.sum(), "logits": LOGITS},
    "model output": ModelOutput(loss=OTHER.sum(), logits=LOGITS),
    "object": SimpleNamespace(logits=LOGITS, hidden_states=(OTHER,)),
    "slots": Slotted(LOGITS),
    "named tuple": Outputs(OTHER, LOGITS),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_logits_are_extracted_from_every_kind_of_output(kind: str) -> None:
    assert get_logits(OUTPUTS[kind]) is LOGITS


@pytest.mark.parametrize(
    ("output", "description"),
    [
        ({"scores": LOGITS}, "not dict with the keys 'scores'"),
        ({"out": None}, "not dict with the keys 'out'"),
        ((), "not tuple"),
        ((None, 3), "not tuple"),
        (None, "not NoneType"),
        (SimpleNamespace(logits=LOGITS.numpy()), "not SimpleNamespace"),
    ],
)
def test_an_output_without_logits_is_named(output: Any, description: str) -> None:
    with pytest.raises(DfkdError, match=f"must return logits: .* under 'out' or 'logits', {description}$"):
        get_logits(output)


class Wrapped(nn.Module):
    """A small network with auxiliary outputs in training mode, or in both modes."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any], *, always: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head, self.auxiliary = nn.Linear(8, 5), nn.Linear(8, 5)
        self.wrap = wrap
        self.always = always

    def forward(self, images: Tensor) -> Any:
        features = self.body(images)
        logits = self.head(features)
        return self.wrap(logits, self.auxiliary(features)) if self.always or self.training else logits


WRAPS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda logits, other: (logits, other),
    "dict": lambda logits, other: {"aux": other, "out": logits},
    "model output": lambda logits, other: ModelOutput(logits=logits, other=other),
    "object": Output,
    "named tuple": lambda logits, other: Outputs(other, logits),
}


def images() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", WRAPS)
@pytest.mark.parametrize("always", [True, False])
def test_logits_only_returns_the_logits_in_both_modes(kind: str, always: bool) -> None:
    network = Wrapped(WRAPS[kind], always=always)
    before = copy.deepcopy(network.state_dict())
    wrapper = logits_only(network, images())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert network.training and wrapper.training and next(wrapper.parameters()) is next(network.parameters())
    for mode in (True, False):
        wrapper.train(mode)
        copied = copy.deepcopy(network)
        assert torch.equal(wrapper(images()), copied.head(copied.body(images())))


@pytest.mark.parametrize("kind", WRAPS)
def test_logits_are_extracted_while_a_network_is_traced_or_compiled(kind: str) -> None:
    network = freeze(logits_only(Wrapped(WRAPS[kind]).eval(), images()))
    expected = network(images())
    folded = fold(network)
    assert not any(isinstance(layer, nn.BatchNorm2d) and "folded_norm" not in name for name, layer in folded.named_modules())
    torch.testing.assert_close(folded(images()), expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    counter = CompileCounter()
    assert torch.equal(torch.compile(network, backend=counter, fullgraph=True)(images()), expected)
    assert counter.frame_count == 1


def test_logits_only_returns_a_network_with_tensor_outputs_unchanged() -> None:
    network = Wrapped(lambda logits, _: logits)
    assert logits_only(network, images()) is network
    only_in_training = Wrapped(WRAPS["tuple"], always=False).eval()
    assert logits_only(only_in_training, images()) is only_in_training


@pytest.mark.parametrize(
    ("kind", "description"),
    [
        ("tuple", "returns tuple in training mode: element 0 is used as logits, not element 1"),
        ("dict", "returns dict in training mode: 'out' is used as logits, not 'aux'"),
        ("model output", "returns ModelOutput in training mode: 'logits' is used as logits, not 'other'"),
        ("object", "returns Output in training mode: logits is used as logits, not other"),
        ("named tuple", "returns Outputs in training mode: logits is used as logits, not features"),
    ],
)
def test_auxiliary_outputs_are_described(kind: str, description: str) -> None:
    network = Wrapped(WRAPS[kind], always=False)
    before = copy.deepcopy(network.state_dict())
    assert extract_logits(network, images())[1] == f"{description}; layers used only for these are not trained"
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert extract_logits(network.eval(), images())[1] is None


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits, other: logits,
        lambda logits, other: (logits,),
        lambda logits, other: (logits, None),
        lambda logits, other: {"out": logits},
        lambda logits, other: Slotted(logits),
        lambda logits, other: ModelOutput(logits=logits, hidden_states=None),
    ],
)
def test_an_output_of_logits_only_has_no_description(wrap: Callable[[Tensor, Tensor], Any]) -> None:
    assert extract_logits(Wrapped(wrap), images())[1] is None


def test_torchvisions_auxiliary_classifiers_are_described() -> None:
    torch.manual_seed(0)
    network = torchvision.models.googlenet(weights=None, init_weights=False, num_classes=5, aux_logits=True)
    x = torch.randn(2, 3, 32, 32)
    wrapper, description = extract_logits(network, x)
    assert description is not None and "logits is used as logits, not aux_logits2, aux_logits1" in description
    assert wrapper(x).shape == (2, 5) and wrapper.eval()(x).shape == (2, 5)


class Stateful(nn.Module):
    """Has every kind of side effect that a forward pass can have."""

    moving: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.register_buffer("moving", torch.zeros(4))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        warnings.warn("called", stacklevel=1)
        self.calls += 1
        self.moving = self.moving + 1
        return self.layers(x.mul_(2))


def test_a_dry_run_has_no_side_effects() -> None:
    network = Stateful()
    network.layers[1].eval()
    next(network.parameters()).grad = torch.ones(4, 3, 3, 3)
    saved = io.BytesIO()
    torch.save(network.state_dict(), saved)
    modes = [module.training for module in network.modules()]
    random_state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with dry_run(network) as trial:
            trial.train()(images()).sum().backward()
            assert trial.calls == 1
            assert trial.get_submodule("layers.1").num_batches_tracked == 1
    after = io.BytesIO()
    torch.save(network.state_dict(), after)
    assert after.getvalue() == saved.getvalue()
    assert network.calls == 0
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [parameter.grad is not None for parameter in network.parameters()] == [True, False, False, False]
    assert torch.equal(next(network.parameters()).grad, torch.ones(4, 3, 3, 3))  # type: ignore[arg-type]


def test_a_dry_run_compiles_nothing() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    network: Any = torch.compile(nn.Linear(3, 2), backend=counter)
    with dry_run(network) as trial:
        trial(torch.ones(2, 3))
    assert counter.frame_count == 0
    network(torch.ones(2, 3))
    assert counter.frame_count == 1
