import copy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dfkd_fast.methods import EmaGenerator, Replay
from dfkd_fast.models import GeneratorA


def generator() -> GeneratorA:
    torch.manual_seed(0)
    return GeneratorA(5, 3, 8, width=4)


def train_a_little(network: nn.Module) -> None:
    network.train()(torch.randn(6, 5))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter))


def state(network: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(network.state_dict())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("decay", [0.0, 0.2, 0.95, 1.0])
def test_parameters_and_statistics_follow_the_closed_form_and_counters_are_copied(layout: torch.memory_format, decay: float) -> None:
    original = generator().to(memory_format=layout)
    average, history = EmaGenerator(original, decay), [state(original)]
    for _ in range(4):
        train_a_little(original)
        average.follow(original)
        history.append(state(original))
    weights = [decay**4, *((1 - decay) * decay ** (3 - age) for age in range(4))]
    kinds = set()
    for name, actual in average.generator.state_dict().items():
        kinds.add(name.rpartition(".")[2])
        if actual.is_floating_point():
            expected = sum(weight * past[name].double() for weight, past in zip(weights, history, strict=True))
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
        else:
            assert actual.item() == 4
    assert kinds == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def test_the_average_starts_equal_and_shares_nothing_with_its_generator() -> None:
    original = generator()
    average, start = EmaGenerator(original, 0.95), state(original)
    train_a_little(original)
    assert all(torch.equal(tensor, start[name]) for name, tensor in average.generator.state_dict().items())
    moved = state(original)
    average.follow(original)
    assert all(torch.equal(tensor, moved[name]) for name, tensor in original.state_dict().items())


def test_the_average_is_never_trained_and_its_generator_still_is() -> None:
    original = generator()
    average = EmaGenerator(original, 0.95)
    average.follow(original)
    assert not any(parameter.requires_grad for parameter in average.generator.parameters())
    assert not average.generator(torch.randn(6, 5)).requires_grad
    assert original.training
    assert all(parameter.requires_grad for parameter in original.parameters())


def test_the_average_normalises_with_its_statistics_and_leaves_them_alone() -> None:
    original = generator()
    average = EmaGenerator(original, 0.5)
    train_a_little(original)
    average.follow(original)
    before, z = state(average.generator), torch.randn(6, 5)
    images = average.generator(z)
    assert all(torch.equal(tensor, before[name]) for name, tensor in average.generator.state_dict().items())
    torch.testing.assert_close(images[:1], average.generator(z[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "wrong", [{"kind": "bank"}, {"ema_decay": 1.5}, {"ema_decay": -0.1}, {"weight": -1.0}, {"fresh_weight": -1.0}, {"decay": 0.9}]
)
def test_a_section_with_a_wrong_value_names_the_field(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Replay(**wrong)
