"""Networks with auxiliary outputs are distilled, trained and evaluated by their logits."""

import copy
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_fast import Replay, Trainer
from dfkd_fast.engine.optim import Optimizer
from dfkd_fast.engine.teach import TeacherTrainer
from dfkd_fast.evaluation import evaluate
from tests.small import small_method, small_networks

Outputs = namedtuple("Outputs", ["aux", "logits"])


class Returning(nn.Module):
    """A network whose output is wrapped, in both modes or in training only."""

    def __init__(self, network: nn.Module, wrap: Callable[[Tensor, Tensor], Any], *, always: bool) -> None:
        super().__init__()
        self.network = network
        self.wrap = wrap
        self.always = always

    def forward(self, images: Tensor) -> Any:
        logits = self.network(images)
        return self.wrap(logits, logits * images.mean()) if self.always or self.training else logits


WRAPS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda logits, other: (logits, other),
    "logits": lambda logits, other: {"aux": other, "logits": logits},
    "named tuple": lambda logits, other: Outputs(other, logits),
}


@pytest.mark.parametrize("kind", WRAPS)
@pytest.mark.parametrize("replay", ["none", "vae"])
def test_networks_with_auxiliary_outputs_train_identically(kind: str, replay: Any) -> None:
    teacher, student, generator = small_networks()
    method = small_method(replay=Replay(kind=replay), epochs=1)
    torch.manual_seed(0)
    bare = Trainer(*copy.deepcopy((teacher, student, generator)), method)
    torch.manual_seed(0)
    wrapped = Trainer(
        Returning(teacher, WRAPS[kind], always=True), Returning(student, WRAPS[kind], always=False), copy.deepcopy(generator), method
    )
    bare.fit()
    result: Any = wrapped.fit()
    assert [epoch.losses for epoch in bare.history] == [epoch.losses for epoch in wrapped.history]
    for ours, theirs in zip(bare.result.state_dict().values(), result.network.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", WRAPS)
@pytest.mark.parametrize("always", [True, False])
def test_a_teacher_that_returns_more_is_trained_and_evaluated_as_one_that_does_not(kind: str, always: bool) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    wrapped = Returning(copy.deepcopy(network), WRAPS[kind], always=always)
    data = [(torch.randn(8, 1, 4, 4), torch.arange(8) % 3)]
    for teacher in (network, wrapped):
        list(TeacherTrainer(teacher, data, Optimizer(lr=0.1), 2, torch.Generator(), data[0][0], torch.device("cpu")))
    assert all(torch.equal(*pair) for pair in zip(network.parameters(), wrapped.parameters(), strict=True))
    result = evaluate({"bare": network, "wrapped": wrapped}, data, "cpu", reference="bare")
    assert result.networks["bare"] == result.networks["wrapped"]
    assert result.agreements[0].top1 == 100
