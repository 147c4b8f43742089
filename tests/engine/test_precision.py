import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast import DfkdError, Loop, Method, Optimizer, Replay, Trainer
from dfkd_fast.engine.optim import build_optimizer
from dfkd_fast.engine.steps import generator_step, student_step
from dfkd_fast.kernels import use_backend
from tests.small import Networks, small_networks

MakeTrainer = Callable[..., Trainer]


def networks() -> Networks:
    return small_networks(teacher="wrn10_1", student="wrn10_1", channels=3)


def method(precision: Any, **changes: Any) -> Method:
    return Method(
        loop=Loop(batch_size=16, epochs=1, iterations_per_epoch=1, student_steps=1, precision=precision, **changes),
        student_optimizer=Optimizer(lr=0.01),
        generator_optimizer=Optimizer(lr=0.01),
    )


def gradient(network: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None])


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def by_hand(step: str, autocast: bool) -> Tensor:
    """The gradient of a first step as a textbook has it, in float32 or under autocast."""
    teacher, student, generator = copy.deepcopy(networks())
    teacher.eval()
    z = torch.randn(16, 20, generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        images = generator(z)
        if step == "student":
            images = images.detach()
        loss = F.l1_loss(student(images).float(), teacher(images).float())
    (loss if step == "student" else -loss).backward()
    return gradient(student if step == "student" else generator)


@pytest.mark.parametrize("step", ["student", "generator"])
@pytest.mark.parametrize("fold_teacher", [False, True])
def test_a_step_in_bf16_errs_no_more_than_plain_autocast(make_trainer: MakeTrainer, step: str, fold_teacher: bool) -> None:
    exact, plain = by_hand(step, autocast=False), by_hand(step, autocast=True)
    trainer = make_trainer(method("bf16", fold_teacher=fold_teacher), networks=networks())
    with use_backend("reference"):
        student_step(trainer._game) if step == "student" else generator_step(trainer._game)
    found = gradient(trainer.student if step == "student" else trainer.generator)
    assert 0 < relative(found, exact) <= 1.5 * relative(plain, exact)


def test_weights_averages_and_optimiser_states_stay_float32_in_bf16(make_trainer: MakeTrainer) -> None:
    chosen = method("bf16", student_ema_decay=0.9)
    chosen = Method(loop=chosen.loop, replay=Replay(kind="ema_generator"), student_optimizer=Optimizer(kind="adam", lr=1e-3))
    trainer = make_trainer(chosen, networks=networks())
    trainer.fit()
    assert trainer.average is not None and trainer.memory is not None and trainer.memory.generator is not None
    for network in (trainer.student, trainer.generator, trainer.teacher, trainer.average, trainer.memory.generator):
        assert {tensor.dtype for tensor in network.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
    states = [value for state in trainer.student_optimizer.state.values() for value in state.values()]
    assert {value.dtype for value in states if value.ndim} == {torch.float32}
    working = trainer._game.teacher
    assert {layer.weight.dtype for layer in working.modules() if isinstance(layer, nn.Conv2d | nn.Linear)} == {torch.bfloat16}
    assert trainer._game.images.dtype == torch.bfloat16


@pytest.mark.parametrize("replay", ["none", "ema_generator", "memory_bank", "vae"])
@pytest.mark.parametrize("update", ["plain", "second-order"])
def test_every_replay_and_update_runs_in_bf16_near_its_float32_loss(make_trainer: MakeTrainer, replay: Any, update: Any) -> None:
    if update == "second-order" and replay == "none":
        pytest.skip("needs replayed samples")
    losses = []
    for precision in ("fp32", "bf16"):
        chosen = Method(
            loop=Loop(batch_size=16, epochs=1, iterations_per_epoch=1, student_steps=2, precision=precision),
            replay={"kind": replay, "vae": {"latent_dim": 8, "width": 4}, "memory_bank": {"every": 1}},  # type: ignore[arg-type]
            update={"kind": update, "inner_lr": 0.01},  # type: ignore[arg-type]
            student_optimizer=Optimizer(lr=0.01),
        )
        trainer = make_trainer(chosen, networks=networks())
        trainer.fit()
        losses.append(trainer.history[0].losses)
    assert losses[0].keys() == losses[1].keys()
    for name, loss in losses[0].items():
        assert losses[1][name] == pytest.approx(loss, rel=0.05)


@pytest.mark.parametrize("changes", [{"replay": {"kind": "vae"}}, {"replay": {"kind": "memory_bank"}, "update": {"kind": "first-order"}}])
def test_fp16_is_refused_where_losses_cannot_be_scaled(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'bf16'"):
        Method(loop=Loop(precision="fp16"), **changes)


def test_scaled_losses_give_the_same_student(make_trainer: MakeTrainer) -> None:
    # 2^16 is a power of two: scaling by it and back is exact, so that only a forgotten one of the two can show.
    plain, scaled = (make_trainer(method("fp32"), networks=networks()) for _ in range(2))
    scaled.precision.scalers = {role: torch.amp.GradScaler("cpu", init_scale=2.0**16) for role in scaled.precision.scalers}
    for trainer in (plain, scaled):
        trainer.fit()
    for ours, theirs in zip(plain.student.parameters(), scaled.student.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_compiled_networks_take_the_same_steps(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced and run by PyTorch's own operators: what a compiler does with the trace is its own business.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    eager, compiled = (make_trainer(method("fp32", compile=wanted), networks=networks()) for wanted in (False, True))
    for trainer in (eager, compiled):
        trainer.fit()
    assert compiled.history[0].losses == pytest.approx(eager.history[0].losses, rel=1e-5)
    assert compiled.student.state_dict().keys() == eager.student.state_dict().keys()


@pytest.mark.parametrize("kind", ["apex_sgd", "apex_adam"])
def test_apex_without_apex_says_what_is_missing_and_what_to_choose(kind: Any) -> None:
    with pytest.raises(DfkdError, match=r"NVIDIA's apex.*another project.*'sgd' or 'adam'"):
        build_optimizer(Optimizer(kind=kind), [nn.Parameter(torch.zeros(1))], torch.device("cpu"))


def test_a_teacher_that_cannot_be_folded_is_used_as_it_is_and_that_is_said(make_trainer: MakeTrainer) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x if x.mean() > 0 else -x)

    _, student, generator = networks()
    trainer = make_trainer(method("fp32"), networks=(Branching(), student, generator))
    trainer.fit()
    assert len(trainer.remarks) == 1
    assert "not folded: Branching cannot be traced" in trainer.remarks[0]
