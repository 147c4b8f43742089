"""``Epoch.relative_bn_moments``: the term ``bn_moments`` as a number without unit, 0 for equal statistics."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from dfkd_fast import Method, Objective, Trainer
from tests.small import small_method, small_networks
from tests.states import through_a_file

MakeTrainer = Callable[..., Trainer]
NETWORKS = {"teacher": "wrn10_1", "student": "wrn10_1", "channels": 3}


def with_statistics(method: Method, weight: float) -> Method:
    return replace(method, objective=Objective(bn_moments=weight))


def realistic_teacher() -> nn.Module:
    torch.manual_seed(5)
    teacher = small_networks(**NETWORKS)[0]  # type: ignore[arg-type]
    for layer in teacher.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None and layer.running_var is not None
            layer.running_mean.normal_(std=0.3)
            layer.running_var.uniform_(0.2, 2.0)
    return teacher


def size_of_the_statistics(teacher: nn.Module) -> float:
    norms = [layer for layer in teacher.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert norms
    tensors = [
        tensor.numpy().astype(np.float64) for norm in norms for tensor in (norm.running_mean, norm.running_var) if tensor is not None
    ]
    return float(sum(np.sqrt((tensor**2).sum()) for tensor in tensors))


@pytest.mark.parametrize("fold_teacher", [False, True])
@pytest.mark.parametrize("weight", [1.0, 0.01])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_it_is_the_unweighted_term_over_the_norms_of_the_running_statistics(fold_teacher: bool, weight: float, micro_batches: int) -> None:
    teacher = realistic_teacher()
    expected = size_of_the_statistics(teacher)
    method = with_statistics(small_method(fold_teacher=fold_teacher), weight)
    method = replace(method, engine=replace(method.engine, micro_batches=micro_batches))
    trainer = Trainer(teacher, *small_networks(**NETWORKS)[1:], method, seed=3)  # type: ignore[arg-type]
    for epoch in trainer:
        assert epoch.relative_bn_moments == pytest.approx(epoch.losses["bn_moments"] / weight / expected, rel=1e-5)
    assert len(trainer.history) == 2


def test_it_is_one_for_activations_that_are_zero_and_zero_for_equal_statistics() -> None:
    class Fixed(nn.Module):
        """Returns logits of images; its batch norm sees ``scale`` times noise of known moments."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(1)
            self.linear = nn.Linear(3 * 16 * 16, 10)
            self.scale = 0.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            noise = torch.tensor([1.0, 5.0]).repeat(8)[None, None, :, None] * self.scale
            return self.linear(x.flatten(1)) + self.norm(noise.expand(len(x), 1, 16, 16)).mean()

    teacher = Fixed()
    assert teacher.norm.running_mean is not None and teacher.norm.running_var is not None
    teacher.norm.running_mean.fill_(3.0)  # of 1 and 5, whose variance is 4
    teacher.norm.running_var.fill_(4.0)
    method = with_statistics(small_method(fold_teacher=False), 0.5)
    for scale, expected in ((0.0, 1.0), (1.0, 0.0)):
        teacher.scale = scale
        networks = small_networks(**NETWORKS)  # type: ignore[arg-type]
        trainer = Trainer(teacher, *networks[1:], method, seed=3)
        epoch = next(iter(trainer))
        assert epoch.relative_bn_moments == pytest.approx(expected, abs=1e-6)


def test_without_the_term_there_is_none(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(small_method())
    trainer.fit()
    assert [epoch.relative_bn_moments for epoch in trainer.history] == [None, None]


def test_a_run_that_resumes_at_the_end_of_an_epoch_reports_the_same(make_trainer: MakeTrainer) -> None:
    method = with_statistics(small_method(), 0.5)
    whole = make_trainer(method, networks=small_networks(**NETWORKS))  # type: ignore[arg-type]
    states = []
    whole.on_iteration = lambda trainer: states.append(through_a_file(trainer.state_dict()))
    whole.fit()
    resumed = make_trainer(method, networks=small_networks(**NETWORKS))  # type: ignore[arg-type]
    resumed.load_state_dict(states[-1])  # before its last epoch is closed
    assert len(resumed.history) == 1
    resumed.fit()
    assert resumed.history[-1].relative_bn_moments == whole.history[-1].relative_bn_moments


def test_an_epoch_of_an_earlier_checkpoint_has_none(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(small_method())
    next(iter(trainer))
    state = trainer.state_dict()
    for epoch in state["history"]:
        del epoch["relative_bn_moments"]
    trainer.load_state_dict(state)
    assert trainer.history[0].relative_bn_moments is None
