"""The passes over networks as they are given: each has a switch, and none changes what was given."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from dfkd_fast import Engine, Method, Trainer
from dfkd_fast.engine.prepare import PASSES
from dfkd_fast.surgery import BatchNormLeakyReLU2d, CpuConv2d
from tests.small import small_method, small_networks

PLAIN = Engine(precision="fp32", channels_last=False, cpu_convolutions=False, fuse_norm_act=False, fold_teacher=False, keep_memory=False)


def trainer(engine: Engine) -> Trainer:
    networks = small_networks(teacher="wrn10_1", student="wrn10_1", channels=3)
    return Trainer(*networks, replace(small_method(), engine=engine))


def working(trainer: Trainer) -> dict[str, nn.Module]:
    return {"teacher": trainer.state.teacher, "student": trainer.state.student, "generator": trainer.state.generator}


def kinds(network: nn.Module) -> set[type[nn.Module]]:
    return {type(layer) for layer in network.modules()}


def effects(trainer: Trainer) -> set[str]:
    """Which passes left a trace in the networks that the steps call."""
    networks = working(trainer)
    weights = [parameter for network in networks.values() for parameter in network.parameters() if parameter.ndim == 4]
    traces = {
        "channels_last": all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights),
        "cpu_convolutions": all(CpuConv2d in kinds(network) for network in networks.values()),
        "fuse_norm_act": BatchNormLeakyReLU2d in kinds(networks["generator"]),
        "fold_teacher": any(hasattr(layer, "folded_norm") for layer in networks["teacher"].modules()),
        "precision": any(parameter.dtype == torch.bfloat16 for parameter in networks["teacher"].parameters()),
    }
    return {name for name, left in traces.items() if left}


def test_with_every_switch_off_the_networks_compute_as_they_were_given() -> None:
    plain = trainer(PLAIN)
    assert effects(plain) == set()
    for role, network in working(plain).items():
        assert kinds(network) == kinds(getattr(plain, role))


@pytest.mark.parametrize(
    ("switch", "value"),
    [("channels_last", True), ("cpu_convolutions", True), ("fuse_norm_act", True), ("fold_teacher", True), ("precision", "bf16")],
)
def test_a_switch_turns_on_its_own_pass_and_no_other(switch: str, value: Any) -> None:
    changes: dict[str, Any] = {switch: value}
    assert effects(trainer(replace(PLAIN, **changes))) == {switch}


def test_all_passes_together_leave_the_classes_and_modes_of_what_was_given() -> None:
    given = small_networks(teacher="wrn10_1", student="wrn10_1", channels=3)
    before = [[(type(layer), layer.training) for layer in network.modules()] for network in given]
    prepared = Trainer(*given, Method(engine=Engine(precision="bf16")))
    assert effects(prepared) == {"channels_last", "cpu_convolutions", "fuse_norm_act", "fold_teacher", "precision"}
    assert [[(type(layer), layer.training) for layer in network.modules()] for network in given] == before


@pytest.mark.parametrize("role", ["student", "generator"])
def test_what_is_trained_shares_its_tensors_with_what_was_given(role: str) -> None:
    prepared = trainer(Engine(precision="bf16"))
    own, given = working(prepared)[role], getattr(prepared, role)
    assert [tensor.data_ptr() for tensor in own.parameters()] == [tensor.data_ptr() for tensor in given.parameters()]
    assert [tensor.data_ptr() for tensor in own.buffers()] == [tensor.data_ptr() for tensor in given.buffers()]


def test_the_generator_is_prepared_first_since_the_other_passes_look_at_its_images() -> None:
    assert next(iter(PASSES)) == "generator"
