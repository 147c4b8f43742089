"""What only a GPU can show of the engine."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_fast import Loop, Method, Optimizer, Trainer
from tests.small import small_networks

pytestmark = pytest.mark.gpu
MakeTrainer = Callable[..., Trainer]

REPLAYS: list[dict[str, Any]] = [
    {"kind": "none"},
    {"kind": "ema_generator"},
    {"kind": "memory_bank", "memory_bank": {"every": 1}},
    {"kind": "vae", "vae": {"latent_dim": 8, "width": 4, "steps": 1}},
]


def method(replay: dict[str, Any], update: str, *, capture: bool, precision: str = "fp32") -> Method:
    return Method(
        loop=Loop(
            batch_size=8,
            epochs=3,
            iterations_per_epoch=3,
            student_steps=2,
            student_ema_decay=0.9,
            capture=capture,
            precision=precision,  # type: ignore[arg-type]
        ),
        replay=replay,  # type: ignore[arg-type]
        update={"kind": update, "inner_lr": 0.01},  # type: ignore[arg-type]
        objective={"bn_moments": 1.0},  # type: ignore[arg-type]
        student_optimizer=Optimizer(lr=0.01, schedule="cosine"),
        generator_optimizer=Optimizer(kind="adam", lr=1e-3),
    )


def run(make_trainer: MakeTrainer, chosen: Method) -> Trainer:
    trainer = make_trainer(chosen, networks=small_networks(teacher="wrn10_1", student="wrn10_1", channels=3), device="cuda")
    trainer.fit()
    return trainer


@pytest.mark.parametrize("replay", REPLAYS, ids=lambda replay: str(replay["kind"]))
@pytest.mark.parametrize("update", ["plain", "second-order"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_captured_run_equals_the_eager_run(make_trainer: MakeTrainer, replay: dict[str, Any], update: str, precision: str) -> None:
    if update == "second-order" and replay["kind"] == "none":
        pytest.skip("needs replayed samples")
    # cuDNN may choose another algorithm for a captured convolution, and the game amplifies rounding.
    torch.backends.cudnn.deterministic = True
    eager, captured = (run(make_trainer, method(replay, update, capture=wanted, precision=precision)) for wanted in (False, True))
    assert captured.remarks == eager.remarks == []
    for ours, theirs in zip(captured.history, eager.history, strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=2e-2 if precision == "bf16" else 1e-3)


def test_every_replay_draws_other_samples_and_sees_the_schedule(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(method({"kind": "ema_generator"}, "plain", capture=True), device="cuda")
    seen: list[Tensor] = []
    trainer.on_iteration = lambda trainer: seen.append(trainer._game.images.clone())
    trainer.fit()
    assert not any(torch.equal(one, other) for one, other in itertools.pairwise(seen))
    rate = trainer.student_optimizer.param_groups[0]["lr"]
    assert isinstance(rate, Tensor)
    assert rate.item() < 0.01


@pytest.mark.parametrize("replay", REPLAYS, ids=lambda replay: str(replay["kind"]))
@pytest.mark.parametrize("capture", [False, True])
def test_no_step_waits_for_the_gpu(make_trainer: MakeTrainer, replay: dict[str, Any], capture: bool) -> None:
    trainer = make_trainer(method(replay, "plain", capture=capture), device="cuda")
    trainer._iterate()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer._iterate()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_resumed_captured_run_equals_an_uninterrupted_one(make_trainer: MakeTrainer) -> None:
    torch.backends.cudnn.deterministic = True
    chosen = method({"kind": "ema_generator"}, "plain", capture=True)
    whole = make_trainer(chosen, device="cuda")
    whole.fit()
    stopped = make_trainer(chosen, device="cuda")
    stopped.on_iteration = lambda trainer: trainer.stop() if trainer.iterations_done == 4 else None
    stopped.fit()
    resumed = make_trainer(chosen, seed=9, device="cuda")
    resumed.load_state_dict(stopped.state_dict())
    resumed.fit()
    for ours, theirs in zip(resumed.history, whole.history, strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-3)


def test_what_cannot_be_captured_runs_eagerly_and_is_said(make_trainer: MakeTrainer) -> None:
    class Waits(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x * (2.0 if x.sum().item() > 1e9 else 1.0))

    teacher, student, generator = small_networks()
    chosen = Method(loop=Loop(batch_size=4, epochs=1, iterations_per_epoch=2, student_steps=1))
    trainer = make_trainer(chosen, networks=(teacher, Waits(student), generator), device="cuda")
    trainer.fit()
    assert trainer.finished
    assert any("run eagerly, not as CUDA graphs" in remark for remark in trainer.remarks)
