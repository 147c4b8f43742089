import copy

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor, nn

from dfkd_fast.engine.drift import Drift
from dfkd_fast.models import GeneratorA, GeneratorSettings, build_generator
from tests.states import assert_equal


def student() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(), nn.Linear(144, 5))
    network(torch.randn(6, 1, 8, 8))
    return network


def versions(count: int) -> list[GeneratorA]:
    torch.manual_seed(1)
    return [GeneratorA(7, 1, 8, width=2) for _ in range(count)]


def predictions(network: nn.Module, generator: nn.Module, z: Tensor) -> Tensor:
    network, generator = copy.deepcopy(network).double().eval(), copy.deepcopy(generator).double().eval()
    with torch.no_grad():
        return network(generator(z)).softmax(1)


def test_drift_is_the_mean_divergence_between_this_version_and_the_one_before_from_the_same_latents() -> None:
    network, drift = student(), Drift(samples=9)
    latents: list[Tensor] = []
    first, second, third = versions(3)
    first.register_forward_pre_hook(lambda _, inputs: latents.append(inputs[0].double()))
    assert drift.measure(network, {"it": first}) == {}
    with torch.no_grad():
        network[0].weight.mul_(2)  # type: ignore[index]
    for before, after in ((first, second), (second, third), (third, third)):
        p, q = (predictions(network, generator, latents[0]).numpy() for generator in (before, after))
        expected = (jensenshannon(p, q, axis=1) ** 2).mean()
        assert drift.measure(network, {"it": after}) == {"it": pytest.approx(expected, rel=1e-3, abs=1e-7)}
    assert latents[0].shape == (9, 7)


def test_each_generator_is_compared_with_its_previous_version_from_its_second_call_on() -> None:
    network, drift = student(), Drift(samples=4)
    one, other, another = versions(3)
    drift.measure(network, {"one": one})
    assert drift.measure(network, {"one": one, "other": other}) == {"one": pytest.approx(0, abs=1e-7)}
    divergences = drift.measure(network, {"one": one, "other": another})
    assert divergences["one"] == pytest.approx(0, abs=1e-7)
    assert divergences["other"] > 1e-4


def test_measuring_changes_no_network() -> None:
    network, (generator,) = student(), versions(1)
    before = copy.deepcopy([network.state_dict(), generator.state_dict()])
    Drift(samples=4).measure(network, {"it": generator})
    assert_equal([network.state_dict(), generator.state_dict()], before)
    assert network.training and generator.training


def test_a_conditional_generator_is_checked_with_every_class() -> None:
    torch.manual_seed(0)
    generator = build_generator(GeneratorSettings(latent_dim=7, width=2, conditional=True), 1, 8, num_classes=3)
    assert generator.embedding is not None
    network, drift = student(), Drift(samples=6)
    drift.measure(network, {"it": generator})
    for label in range(3):
        with torch.no_grad():
            generator.embedding.weight[label] += 3
        assert drift.measure(network, {"it": generator})["it"] > 1e-5
