"""Which batch ``--fit`` finds, on a CPU whose students run out of memory when told to."""

import pytest
import torch
from torch import Tensor, nn

from dfkd_fast import DfkdError, Trainer
from dfkd_fast.commands import distill
from dfkd_fast.commands.networks import build_networks
from dfkd_fast.recipe import Recipe, load_recipe

CPU = torch.device("cpu")


def fit(monkeypatch: pytest.MonkeyPatch, kind: str, *, training: int, evaluating: int) -> int:
    """The batch found where a student takes so many images."""

    def refuse(student: nn.Module, inputs: tuple[Tensor]) -> None:
        if len(inputs[0]) > (training if student.training else evaluating):
            raise torch.OutOfMemoryError("CUDA out of memory")

    def build(recipe: Recipe, device: torch.device) -> tuple[nn.Module, ...]:
        players = build_networks(recipe, CPU)
        players[1].register_forward_pre_hook(refuse)
        return players

    monkeypatch.setattr(distill, "build_networks", build)
    monkeypatch.setattr(distill, "Trainer", lambda *networks, device: Trainer(*networks, device=CPU))
    recipe = load_recipe("digits", {"replay.kind": kind, "data.batch_size": 20, "generator.width": 2, "loop.student_steps": 1})
    return distill.auto_batch_size(recipe, torch.device("cuda")).loop.batch_size


@pytest.mark.parametrize(("kind", "expected"), [("none", 8), ("memory_bank", 4)])
def test_replayed_samples_that_only_later_epochs_have_count(monkeypatch: pytest.MonkeyPatch, kind: str, expected: int) -> None:
    assert fit(monkeypatch, kind, training=8, evaluating=20) == expected


def test_a_batch_that_leaves_no_room_for_the_evaluation_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DfkdError, match="not even a batch of 2 fits"):
        fit(monkeypatch, "none", training=8, evaluating=19)
