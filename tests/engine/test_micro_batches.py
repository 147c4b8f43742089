"""Micro-batches have the gradient of the whole batch."""

import dataclasses

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from dfkd_fast import Engine, Loop, Method, Objective, Replay, Trainer, Update
from dfkd_fast.methods import Batch, Part
from dfkd_fast.models import LeNet5, build_generator
from dfkd_fast.models.generators import GeneratorSettings
from tests.small import small_networks


class Conditional(nn.Module):
    """A generator without batch norm, whose class embedding is shared by the micro-batches."""

    latent_dim = 6

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.body = nn.Sequential(nn.Linear(6, 32 * 32), nn.Tanh(), nn.Unflatten(1, (1, 32, 32)))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.body(z)


def method(pieces: int, update: str = "plain", replay: str = "ema_generator", attention: float = 0.0) -> Method:
    return Method(
        loop=Loop(batch_size=7),
        engine=Engine(micro_batches=pieces),
        objective=Objective(student_weight=1.7, one_hot=0.5, class_nll=1.0, embedding_norm=0.3, attention=attention),
        replay=Replay(kind=replay, rows=5, share=0.4),
        update=Update(kind=update),  # type: ignore[arg-type]
    )


def networks() -> tuple[nn.Module, nn.Module, nn.Module]:
    torch.manual_seed(0)
    return LeNet5(10), LeNet5(10, widths=(3, 8, 60, 42)), Conditional()


@pytest.mark.parametrize("pieces", [2, 3, 5])
@pytest.mark.parametrize("update", ["plain", "pooled"])
@pytest.mark.parametrize("attention", [0.0, 40.0])
def test_micro_batches_give_the_losses_and_gradients_of_the_batch(pieces: int, update: str, attention: float) -> None:
    whole, cut = (Trainer(*networks(), method(count, update, attention=attention), seed=1) for count in (1, pieces))
    assert cut.notes == []
    for role in ("student", "generator"):
        theirs, ours = (trainer.steps.student(0) if role == "student" else trainer.steps.generator() for trainer in (whole, cut))
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)
    for role in ("student", "generator"):
        for (name, one), other in zip(getattr(cut, role).named_parameters(), getattr(whole, role).parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7, msg=f"{role} {name}")


def test_micro_batches_have_equal_sizes() -> None:
    recorded: list[int] = []
    trainer = Trainer(*networks(), method(3), seed=1)
    trainer.student.register_forward_hook(lambda _, inputs, __: recorded.append(len(inputs[0])))
    trainer.steps.student(0)
    trainer.steps.generator()
    assert recorded[:3] == [3, 4, 5]  # 7 fresh and 5 replayed rows in 3 micro-batches
    assert max(recorded[3:]) == 3


def test_micro_batches_partition_the_rows_and_the_weight() -> None:
    images, logits = torch.arange(12.0).view(12, 1, 1, 1), torch.arange(24.0).view(12, 2)
    pieces = list(Batch(images, logits, [Part(7, 1.0), Part(5, 0.7)]).chunks(3))
    assert sorted(torch.cat([piece.images for piece in pieces]).flatten().tolist()) == list(range(12))
    for piece in pieces:
        assert torch.equal(piece.teacher_logits[:, 0], 2 * piece.images.flatten())
        assert all(row < 7 for row in piece.images.flatten()[: piece.parts[0].rows])
    for stored in (0, 5):  # replayed rows with the logits, but not the maps, of the teacher
        maps = logits[: 12 - stored]
        pieces = list(Batch(images, logits, [Part(7, 1.0), Part(5, 0.7)], maps).chunks(3))
        assert sum(len(piece.teacher_features) for piece in pieces if piece.teacher_features is not None) == len(maps)
        for piece in pieces:
            assert piece.teacher_features is not None
            assert torch.equal(piece.teacher_features, piece.teacher_logits[: len(piece.teacher_features)])
    for part in (0, 1):
        assert sum(piece.parts[part].weight for piece in pieces) == pytest.approx((1.0, 0.7)[part])


def test_batch_norms_in_training_add_a_note_that_micro_batches_are_inexact() -> None:
    inexact = dataclasses.replace(method(2), objective=Objective())
    assert "batch norms in training use the statistics of a micro-batch" in Trainer(*small_networks(), inexact).notes[0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pieces": 6}, "must be at most 5, the number of fresh or replayed samples"),
        ({"pieces": 2, "update": "second-order"}, "not supported with update.kind 'second-order'"),
        ({"pieces": 0}, "micro_batches"),
    ],
)
def test_unsupported_micro_batches_are_rejected(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        method(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("batch_size", "classes"), [(30, 10), (7, 10), (25, 10), (4, 1)])
def test_labels_are_drawn_as_evenly_as_a_batch_allows(batch_size: int, classes: int) -> None:
    from dfkd_fast.models import draw_labels

    stream = torch.Generator().manual_seed(0)
    drawn = [draw_labels(torch.empty(batch_size, dtype=torch.long), classes, stream).clone() for _ in range(200)]
    for labels in drawn:
        counts = labels.bincount(minlength=classes)
        assert counts.max() - counts.min() <= 1
    assert torch.stack(drawn).float().mean(0).sub((classes - 1) / 2).abs().max() < 1.1  # no row prefers a class
    assert classes == 1 or len({tuple(labels.tolist()) for labels in drawn}) > 190


def test_a_conditional_generator_is_called_with_the_labels_that_were_drawn() -> None:
    generator = build_generator(GeneratorSettings(conditional=True, width=4, latent_dim=8), 1, 32, num_classes=10)
    torch.manual_seed(0)
    trainer = Trainer(LeNet5(10), LeNet5(10), generator, Method(loop=Loop(batch_size=20), objective=Objective(class_nll=1.0)))
    recorded: list[torch.Tensor] = []
    trainer.generator.body.register_forward_pre_hook(lambda _, inputs: recorded.append(inputs[0].detach().clone()))  # type: ignore[union-attr]
    embedding = generator.embedding.weight.detach().clone()  # type: ignore[union-attr]
    trainer.steps.student(0)
    torch.testing.assert_close(recorded[0], trainer.state.latents + embedding[trainer.state.labels])
    assert trainer.state.labels.bincount(minlength=10).tolist() == 10 * [2]
