"""``--auto-batch-size``, on a CPU with a student that raises out-of-memory errors above a given batch size."""

import pytest
import torch
from torch import Tensor, nn

from dfkd_fast import DfkdError, Trainer
from dfkd_fast.commands import distill
from dfkd_fast.commands.networks import build_networks
from dfkd_fast.recipe import Recipe, load_recipe

CPU = torch.device("cpu")


def largest_batch(monkeypatch: pytest.MonkeyPatch, kind: str, *, training: int, evaluating: int) -> int:
    """Returns the batch size for a student that takes at most so many images in training and in evaluation."""

    def refuse(student: nn.Module, inputs: tuple[Tensor]) -> None:
        if len(inputs[0]) > (training if student.training else evaluating):
            raise torch.OutOfMemoryError("CUDA out of memory")

    def build(recipe: Recipe, device: torch.device) -> tuple[nn.Module, ...]:
        networks = build_networks(recipe, CPU)
        networks[1].register_forward_pre_hook(refuse)
        return networks

    monkeypatch.setattr(distill, "build_networks", build)
    monkeypatch.setattr(distill, "Trainer", lambda *arguments, device: Trainer(*arguments, device=CPU))
    recipe = load_recipe("digits", {"replay.kind": kind, "data.batch_size": 20, "generator.width": 2, "loop.student_steps": 1})
    return distill.auto_batch_size(recipe, torch.device("cuda")).loop.batch_size


@pytest.mark.parametrize(("kind", "expected"), [("none", 8), ("memory_bank", 4)])
def test_replayed_samples_that_only_later_epochs_have_count(monkeypatch: pytest.MonkeyPatch, kind: str, expected: int) -> None:
    assert largest_batch(monkeypatch, kind, training=8, evaluating=20) == expected


def test_a_batch_that_leaves_no_room_for_the_evaluation_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DfkdError, match="not even 2 samples fit"):
        largest_batch(monkeypatch, "none", training=8, evaluating=19)
