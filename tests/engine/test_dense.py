"""The trainer with segmentation networks."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_fast import DfkdError, GeneratorA, Loop, Method, Objective, Optimizer, Replay, Trainer, Update
from dfkd_fast.methods.replay import BankSettings, EmaGeneratorSettings
from dfkd_fast.models import build_model
from tests.small import Networks


def dense_networks() -> Networks:
    torch.manual_seed(0)
    return build_model("small_fcn4", 3, 3), build_model("small_fcn2", 3, 3), GeneratorA(10, 3, 16, width=4)


def method(replay: str = "none", update: str = "plain", *, rows: int = 2, **objective: Any) -> Method:
    kinds: Any = {"kind": replay, "rows": rows, "memory_bank": BankSettings(every=1, cached_logits=True)}
    update_kind: Any = update
    return Method(
        loop=Loop(epochs=3, iterations_per_epoch=2, batch_size=4, student_steps=2, drift_samples=3),
        objective=Objective(**({"adversary": "log_l1"} | objective)),
        replay=Replay(**kinds),
        update=Update(kind=update_kind, inner_lr=0.01),
        student_optimizer=Optimizer(lr=0.01),
    )


class InADict(nn.Module):
    """Returns a dict, like torchvision's segmentation models."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"out": self.network(images), "aux": images}


@pytest.mark.parametrize(
    ("replay", "update"), [("none", "plain"), ("ema_generator", "plain"), ("memory_bank", "first-order"), ("vae", "second-order")]
)
def test_networks_that_return_dicts_train_identically(replay: str, update: str) -> None:
    teacher, student, generator = dense_networks()
    bare = Trainer(*copy.deepcopy((teacher, student, generator)), method(replay, update))
    wrapped = Trainer(InADict(teacher), InADict(student), generator, method(replay, update))
    bare.fit()
    result = wrapped.fit()
    assert isinstance(result, InADict)
    assert [epoch.losses for epoch in bare.history] == [epoch.losses for epoch in wrapped.history]
    assert [epoch.drift for epoch in bare.history] == [epoch.drift for epoch in wrapped.history]
    for ours, theirs in zip(bare.result.state_dict().values(), result.network.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("discrepancy", ["l1", "kl", "js"])
@pytest.mark.parametrize(
    ("replay", "update"),
    [
        *itertools.product(["none", "ema_generator", "memory_bank", "vae"], ["plain", "pooled"]),
        *itertools.product(["ema_generator", "memory_bank", "vae"], ["first-order", "second-order"]),
    ],
)
def test_every_combination_trains_the_student_on_segmentation(discrepancy: str, replay: str, update: str) -> None:
    terms: dict[str, Any] = {"adversary": discrepancy, "bn_moments": 0.01, "one_hot": 0.1, "entropy": 0.1, "activation": 0.1}
    trainer = Trainer(*dense_networks(), method(replay, update, discrepancy=discrepancy, **terms))
    before = copy.deepcopy(trainer.student.state_dict())
    trainer.fit()
    assert all(torch.tensor(list(epoch.losses.values())).isfinite().all() for epoch in trainer.history)
    assert all(trainer.history[-1].drift.values())
    moved = [not torch.equal(before[name], value) for name, value in trainer.student.named_parameters()]
    assert all(moved)


def test_the_average_of_a_generator_follows_on_pixels_as_the_closed_form_says() -> None:
    config = method("ema_generator")
    trainer = Trainer(*dense_networks(), config)
    replay_source = trainer.state.replay_source
    assert replay_source is not None and replay_source.generator is not None
    expected = {name: value.double().clone() for name, value in trainer.generator.named_parameters()}
    decay = config.replay.table(EmaGeneratorSettings).decay
    trainer.on_iteration = lambda trainer: [  # type: ignore[assignment]
        expected[name].lerp_(value.detach().double(), 1 - decay) for name, value in trainer.generator.named_parameters()
    ]
    trainer.fit()
    for name, value in replay_source.generator.named_parameters():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7)


def test_the_adversarys_gradient_reaches_the_generator_and_depends_on_the_student() -> None:
    gradients = []
    for scale in (1.0, 3.0):
        teacher, student, generator = dense_networks()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(scale)
        trainer = Trainer(teacher, student, generator, method())
        trainer.steps.generator()
        gradients.append([parameter.grad.clone() for parameter in generator.parameters() if parameter.grad is not None])
    assert all(gradient.any() for gradient in gradients[0][-2:])
    assert any(not torch.allclose(one, other) for one, other in zip(*gradients, strict=True))


def test_a_term_of_one_class_per_image_is_rejected_for_segmentation() -> None:
    teacher, student, generator = dense_networks()
    generator.embedding = nn.Embedding(3, 10)
    with pytest.raises(DfkdError, match=r"objective\.class_nll = 1\.0: needs one class per image"):
        Trainer(teacher, student, generator, method(class_nll=1.0))


def test_label_maps_of_different_sizes_are_rejected() -> None:
    teacher, student, generator = dense_networks()
    with pytest.raises(DfkdError, match="teacher and student must return logits of the same shape"):
        Trainer(teacher, nn.Sequential(student, nn.MaxPool2d(2)), generator, method())
