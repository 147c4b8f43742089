"""Tests of the engine that require a GPU."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_fast import Engine, Loop, Method, Optimizer, Trainer
from dfkd_fast.surgery import BatchNormAct2d, ConvAct2d
from tests.small import small_networks

pytestmark = pytest.mark.gpu
MakeTrainer = Callable[..., Trainer]

REPLAYS: list[dict[str, Any]] = [
    {"kind": "none"},
    {"kind": "ema_generator"},
    {"kind": "memory_bank", "memory_bank": {"every": 1}},
    {
        "kind": "memory_bank",
        "rows": 11,
        "memory_bank": {"every": 1, "every_unit": "iterations", "draw": "samples", "storage": "uint8", "cached_logits": True},
    },
    {"kind": "vae", "vae": {"latent_dim": 8, "width": 4, "steps": 1}},
]


def method(replay: dict[str, Any], update: str, *, capture: bool, precision: str = "fp32") -> Method:
    return Method(
        loop=Loop(
            batch_size=8,
            epochs=3,
            iterations_per_epoch=3,
            student_steps=3,
            steps_per_batch=2,
            student_ema_decay=0.9,
        ),
        engine=Engine(capture=capture, precision=precision),  # type: ignore[arg-type]
        replay=replay,  # type: ignore[arg-type]
        update={"kind": update, "inner_lr": 0.01},  # type: ignore[arg-type]
        objective={"bn_moments": 1.0, "attention": 250.0, "hint": 3.0},  # type: ignore[arg-type]
        student_optimizer=Optimizer(lr=0.01, schedule="cosine"),
        generator_optimizer=Optimizer(kind="adam", lr=1e-3),
    )


def run(make_trainer: MakeTrainer, chosen: Method) -> Trainer:
    trainer = small_trainer(make_trainer, chosen)
    trainer.fit()
    return trainer


def small_trainer(make_trainer: MakeTrainer, chosen: Method, *, device: str = "cuda", **options: Any) -> Trainer:
    """Networks with batch norms, which the objective of :func:`method` requires."""
    return make_trainer(chosen, networks=small_networks(teacher="wrn10_1", student="wrn10_1", channels=3), device=device, **options)


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN may choose another algorithm for a captured convolution, and the training amplifies rounding."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("replay", REPLAYS, ids=lambda replay: str(replay["kind"]))
@pytest.mark.parametrize("update", ["plain", "second-order"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_captured_run_equals_the_eager_run(make_trainer: MakeTrainer, replay: dict[str, Any], update: str, precision: str) -> None:
    if update == "second-order" and replay["kind"] == "none":
        pytest.skip("needs replayed samples")
    eager, captured = (run(make_trainer, method(replay, update, capture=enabled, precision=precision)) for enabled in (False, True))
    assert captured.notes == eager.notes == []
    for ours, theirs in zip(captured.history, eager.history, strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=2e-2 if precision == "bf16" else 1e-3)


@pytest.mark.usefixtures("deterministic")
def test_a_compiled_captured_run_equals_the_eager_run(make_trainer: MakeTrainer) -> None:
    eager = method({"kind": "ema_generator"}, "plain", capture=False)
    compiled = replace(eager, engine=replace(eager.engine, capture=True, compile=True))
    theirs, ours = (run(make_trainer, chosen) for chosen in (eager, compiled))
    assert ours.notes == theirs.notes == []
    for one, other in zip(ours.history, theirs.history, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=2e-2)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("bn_moments", [0.0, 1.0])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_with_a_fused_teacher_equals_one_without(make_trainer: MakeTrainer, precision: str, bn_moments: float) -> None:
    base = method({"kind": "ema_generator"}, "plain", capture=True, precision=precision)
    base = replace(base, objective=replace(base.objective, attention=0.0, hint=0.0, bn_moments=bn_moments))
    fused, plain = (run(make_trainer, replace(base, engine=replace(base.engine, fuse_teacher=on))) for on in (True, False))
    assert any(isinstance(layer, ConvAct2d) for layer in fused.state.teacher.modules()) and not fused.notes
    assert not any(isinstance(layer, ConvAct2d) for layer in plain.state.teacher.modules())
    tolerance = 1e-3 if precision == "fp32" else 5e-2
    for one, other in zip(fused.history, plain.history, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=tolerance)


def test_batch_norms_are_fused_in_the_optimized_generator_only(make_trainer: MakeTrainer) -> None:
    trainer = run(make_trainer, method({"kind": "ema_generator"}, "plain", capture=True))
    state = trainer.state
    assert any(isinstance(layer, BatchNormAct2d) for layer in state.generator.modules())
    assert not any(type(layer) is nn.BatchNorm2d for layer in state.generator.modules())
    for network in (trainer.generator, trainer.student, state.student, state.teacher):
        assert not any(isinstance(layer, BatchNormAct2d) for layer in network.modules())
    assert state.generator.state_dict().keys() == trainer.generator.state_dict().keys()


def test_every_replay_draws_other_samples_and_sees_the_schedule(make_trainer: MakeTrainer) -> None:
    trainer = small_trainer(make_trainer, method({"kind": "ema_generator"}, "plain", capture=True))
    batches: list[Tensor] = []
    trainer.on_iteration = lambda trainer: batches.append(trainer.state.images.clone())
    trainer.fit()
    assert not any(torch.equal(one, other) for one, other in itertools.pairwise(batches))
    rate = trainer.state.student_optimizer.param_groups[0]["lr"]
    assert isinstance(rate, Tensor)
    assert rate.item() < 0.01


@pytest.mark.parametrize("replay", REPLAYS, ids=lambda replay: str(replay["kind"]))
@pytest.mark.parametrize("capture", [False, True])
def test_no_step_synchronizes_the_gpu(make_trainer: MakeTrainer, replay: dict[str, Any], capture: bool) -> None:
    trainer = small_trainer(make_trainer, method(replay, "plain", capture=capture))
    trainer.iterate()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.iterate()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("deterministic")
def test_a_resumed_captured_run_equals_an_uninterrupted_one(make_trainer: MakeTrainer) -> None:
    chosen = method({"kind": "ema_generator"}, "plain", capture=True)
    whole = small_trainer(make_trainer, chosen)
    whole.fit()
    stopped = small_trainer(make_trainer, chosen)
    stopped.on_iteration = lambda trainer: trainer.stop() if trainer.iterations_done == 4 else None
    stopped.fit()
    resumed = small_trainer(make_trainer, chosen, seed=9)
    resumed.load_state_dict(stopped.state_dict())
    resumed.fit()
    for ours, theirs in zip(resumed.history, whole.history, strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-3)


class Calling(nn.Module):
    """A network that calls a function in each forward pass."""

    def __init__(self, inner: nn.Module, during: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.inner, self.during = inner, during

    def forward(self, x: Tensor) -> Tensor:
        self.during(x)
        return self.inner(x)


def student_calling(make_trainer: MakeTrainer, during: Callable[[Tensor], object]) -> Trainer:
    teacher, student, generator = small_networks()
    chosen = Method(loop=Loop(batch_size=4, epochs=1, iterations_per_epoch=2, student_steps=1))
    return make_trainer(chosen, networks=(teacher, Calling(student, during), generator), device="cuda")


def query(_: Tensor) -> None:
    """An operation that fails during capture but does not synchronize the device."""
    torch.cuda.current_stream().query()


def test_a_synchronizing_step_runs_eagerly_with_a_note(make_trainer: MakeTrainer) -> None:
    trainer = student_calling(make_trainer, lambda x: x.sum().item())
    trainer.fit()
    assert trainer.finished
    (note,) = trainer.notes
    assert "run eagerly, not as CUDA graphs" in note
    assert "synchronizing" in note
    assert "(test_gpu.py, line" in note
    assert torch.cuda.get_sync_debug_mode() == 0


@pytest.mark.last
def test_a_capture_that_fails_leaves_the_process_to_others(make_trainer: MakeTrainer) -> None:
    chosen = method({"kind": "ema_generator"}, "plain", capture=True)
    earlier = small_trainer(make_trainer, chosen)
    earlier.iterate()

    failing = student_calling(make_trainer, query)
    failing.fit()
    assert failing.finished
    (note,) = failing.notes
    assert "captur" in note
    assert "(test_gpu.py, line" in note
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.empty_cache()
    torch.randn(3, device="cuda")

    for trainer in (earlier, small_trainer(make_trainer, chosen)):  # existing graphs, and new ones
        trainer.fit()
        assert trainer.finished
        assert not trainer.notes


@pytest.mark.parametrize("capturing", [False, True])
def test_running_out_of_memory_does_not_disable_capture(make_trainer: MakeTrainer, capturing: bool) -> None:
    stepping: list[bool] = []  # excludes the checks before the training, which call the networks as well

    def allocate(x: Tensor) -> None:
        if torch.cuda.is_current_stream_capturing() or (stepping and not capturing and x.requires_grad):
            torch.empty(1 << 50, device="cuda")

    trainer = student_calling(make_trainer, allocate)
    stepping.append(True)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.fit()
    assert not trainer.notes
    torch.cuda.empty_cache()
    torch.randn(3, device="cuda")


def test_graphs_share_memory(make_trainer: MakeTrainer) -> None:
    large = Method(loop=Loop(batch_size=512), student_optimizer=Optimizer(lr=0.01))
    trainer = small_trainer(make_trainer, large)
    steps = trainer.steps

    def reserved() -> int:
        pool = tuple(next(iter(steps._captured.values())).graph.pool())
        return sum(part["total_size"] for part in torch.cuda.memory_snapshot() if tuple(part["segment_pool_id"]) == pool)

    steps.student(0)
    one = reserved()
    kept = dict(steps._captured)
    steps._captured.clear()
    steps.student(0)  # captures the same step again while the first graph exists
    assert kept.keys() == steps._captured.keys()
    assert 0 < reserved() < 1.5 * one


@pytest.mark.parametrize("capture", [False, True])
def test_a_first_step_that_overflows_leaves_no_momentum(make_trainer: MakeTrainer, capture: bool) -> None:
    chosen = method({"kind": "none"}, "plain", capture=capture, precision="fp16")
    trainer = small_trainer(make_trainer, chosen)
    scale = trainer.state.precision.scalers["student"]._scale
    assert scale is not None
    scale.fill_(2.0**120)
    before = [parameter.clone() for parameter in trainer.student.parameters()]
    garbage = torch.full((1 << 24,), torch.nan, device="cuda")  # contents of uninitialized memory
    del garbage
    trainer._student_steps()
    assert all(torch.equal(*pair) for pair in zip(before, trainer.student.parameters(), strict=True))
    assert not any(state["momentum_buffer"].any() for state in trainer.state.student_optimizer.state.values())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_trainer_captures_on_its_own_gpu_whatever_the_current_one(make_trainer: MakeTrainer) -> None:
    trainer = small_trainer(make_trainer, method({"kind": "ema_generator"}, "plain", capture=True), device="cuda:1")
    with torch.cuda.device(0):
        trainer.fit()
        assert torch.cuda.current_device() == 0
    assert trainer.finished
    assert not trainer.notes
    assert {"student", "generator"} <= trainer.state.clock.seconds.keys()
