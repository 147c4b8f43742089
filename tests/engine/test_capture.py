"""Tests of captured steps with a fake CUDA; tests/engine/test_gpu.py compares replays with eager steps on a GPU."""

import copy
import dataclasses
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dfkd_fast import Engine, Loop, Method, Objective, Optimizer, Replay, Trainer
from dfkd_fast.engine import capture as captures
from dfkd_fast.engine.capture import Steps
from dfkd_fast.engine.state import preserved
from dfkd_fast.engine.steps import generator_step, student_step
from dfkd_fast.methods import VaeReplay
from tests.engine.fake_cuda import CAPTURE_FAILED, NOT_PERMITTED, SYNCHRONIZING, FakeCuda
from tests.small import small_method, small_networks
from tests.states import assert_equal, without_times

MakeTrainer = Callable[..., Trainer]


def method(replay: Replay, kind: str) -> Method:
    return Method(
        loop=Loop(batch_size=4, epochs=1, iterations_per_epoch=2, student_steps=2, student_ema_decay=0.9),
        engine=Engine(channels_last=False),
        replay=replay,
        student_optimizer=Optimizer(kind=kind, lr=0.01),  # type: ignore[arg-type]
        generator_optimizer=Optimizer(kind="adam", lr=1e-3),
    )


def everything(trainer: Trainer) -> list[Tensor]:
    state = trainer.state
    networks = [trainer.student, trainer.generator, state.average, *(state.replay_source.networks if state.replay_source else ())]
    tensors = [tensor for network in networks if network is not None for tensor in network.state_dict().values()]
    return [tensor.clone() for tensor in tensors] + [state.fresh_stream.get_state(), state.replay_stream.get_state()]


REPLAYS = [Replay(), Replay(kind="ema_generator"), Replay(kind="vae", vae={"latent_dim": 8, "width": 4})]  # type: ignore[arg-type]


@pytest.mark.parametrize("replay", REPLAYS, ids=lambda replay: replay.kind)
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_warm_up_steps_do_not_change_the_training_state(make_trainer: MakeTrainer, replay: Replay, kind: str) -> None:
    networks = small_networks(teacher="wrn10_1", student="wrn10_1", channels=3)
    trainer, untouched = (make_trainer(method(replay, kind), networks=networks) for _ in range(2))
    before = everything(trainer)
    with preserved(trainer.state):
        for step in range(2):
            student_step(trainer.state, step)
        generator_step(trainer.state)
        assert not all(torch.equal(a, b) for a, b in zip(before, everything(trainer), strict=True)), "nothing happened inside"
    assert all(torch.equal(a, b) for a, b in zip(before, everything(trainer), strict=True))
    # The optimizers are restored as well: training continues as without warm-up steps.
    torch.manual_seed(0)
    trainer.fit()
    torch.manual_seed(0)
    untouched.fit()
    assert all(torch.equal(a, b) for a, b in zip(everything(trainer), everything(untouched), strict=True))


FORBIDDEN = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero")


@pytest.mark.parametrize("replay", [*REPLAYS, Replay(kind="memory_bank")], ids=lambda replay: replay.kind)
@pytest.mark.parametrize("update", ["plain", "pooled", "first-order", "second-order"])
@pytest.mark.parametrize("attention", [0.0, 250.0])
def test_a_step_does_not_copy_values_to_the_host(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, replay: Replay, update: Any, attention: float
) -> None:
    if update.endswith("order") and not replay.replays:
        pytest.skip("needs replayed samples")
    config = method(replay, "sgd")
    config = Method(
        loop=config.loop,
        replay=replay,
        update={"kind": update},  # type: ignore[arg-type]
        objective=Objective(attention=attention, hint=attention / 50),
        generator_optimizer=Optimizer(lr=0.01),
    )
    trainer = make_trainer(config)
    state = trainer.state
    if isinstance(state.replay_source, VaeReplay):
        # PyTorch's Adam reads its step counter on a CPU; on a GPU it is capturable and does not.
        state.replay_source.optimizer = torch.optim.SGD(state.replay_source.vae.parameters(), lr=0.01)  # type: ignore[assignment]
    student_step(state)
    if state.replay_source is not None:
        state.replay_source.end_epoch(5, state.fresh_batch)

    def refuse(name: str) -> Callable[..., object]:
        def read(*_: object, **__: object) -> object:
            raise AssertionError(f"Tensor.{name} synchronizes the device")

        return read

    with monkeypatch.context() as patched:
        for name in FORBIDDEN:
            patched.setattr(Tensor, name, refuse(name))
        with pytest.raises(AssertionError, match="item"):
            torch.ones(()).item()
        for step in range(2):
            student_step(state, step)
        generator_step(state)


def test_a_learning_rate_from_a_checkpoint_of_a_gpu_is_a_number_on_a_cpu(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(method(Replay(), "sgd"))
    state = copy.deepcopy(trainer.state_dict())
    for optimizer in state["optimizers"]:
        optimizer["param_groups"][0]["lr"] = torch.tensor(0.25)
    trainer.load_state_dict(state)
    assert [group["lr"] for group in trainer.state.student_optimizer.param_groups] == [0.25]
    trainer.fit()


def test_warm_up_runs_steps_and_restores_the_state(make_trainer: Callable[..., Trainer]) -> None:
    untouched, warmed = (make_trainer(small_method(replay=Replay(kind="ema_generator"))) for _ in range(2))
    calls: list[int] = []
    warmed.student.register_forward_hook(lambda *_: calls.append(1))
    warmed.steps.warm_up()
    assert len(calls) == 2
    assert_equal(*(trainer.fit().state_dict() for trainer in (untouched, warmed)))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def captured(trainer: Trainer, during: Callable[[], None] = lambda: None) -> Trainer:
    """Enables capture for a trainer with the fake CUDA; ``during`` is called in every forward pass of the student."""
    trainer.steps = Steps(trainer.state)
    trainer.steps.capturing = True
    trainer.student.register_forward_pre_hook(lambda *_: during())
    return trainer


def short() -> Method:
    return small_method(replay=Replay(kind="ema_generator"), epochs=1)


def test_a_synchronizing_step_is_detected_before_its_capture(make_trainer: MakeTrainer, cuda: FakeCuda) -> None:
    eager, trainer = make_trainer(short()), captured(make_trainer(short()), cuda.wait)
    eager.fit()
    trainer.fit()
    assert "capture" not in cuda.events
    assert cuda.unharmed
    (note,) = trainer.notes
    assert SYNCHRONIZING in note
    assert "(fake_cuda.py, line " in note
    assert_equal(without_times(trainer.state_dict()), without_times(eager.state_dict()))


def test_a_capture_that_fails_leaves_the_process_as_it_was(make_trainer: MakeTrainer, cuda: FakeCuda) -> None:
    def during() -> None:
        cuda.draw()
        cuda.call_library()

    trainer = captured(make_trainer(short()), during)
    trainer.fit()
    assert trainer.finished
    assert cuda.unharmed
    assert cuda.released == cuda.pools[:1]
    (note,) = trainer.notes
    assert NOT_PERMITTED in note
    assert CAPTURE_FAILED not in note


def test_the_line_that_cannot_be_captured_is_the_users_and_not_pytorchs(make_trainer: MakeTrainer, cuda: FakeCuda) -> None:
    def during() -> None:
        if cuda.capturing:
            torch.nn.Linear(2, 3)(torch.ones(5))  # raises in PyTorch's linear.py

    trainer = captured(make_trainer(short()), during)
    trainer.fit()
    (note,) = trainer.notes
    assert "(test_capture.py, line" in note


@pytest.mark.parametrize("when", ["warming up", "capturing", "capturing, and the capture cannot end"])
def test_running_out_of_memory_does_not_disable_capture(make_trainer: MakeTrainer, cuda: FakeCuda, when: str) -> None:
    def during() -> None:
        if cuda.capturing or when == "warming up":
            cuda.invalid = when.endswith("end")
            raise torch.OutOfMemoryError("CUDA out of memory")

    trainer = captured(make_trainer(short()), during)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.fit()
    assert not trainer.notes
    assert cuda.unharmed


def test_the_warm_up_stream_is_awaited_after_an_error(make_trainer: MakeTrainer, cuda: FakeCuda) -> None:
    def fail() -> None:
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        captured(make_trainer(short()), fail).fit()
    assert cuda.events == ["wait", "wait"]


def test_graphs_share_a_pool_and_the_stream_its_blocks_belong_to(make_trainer: MakeTrainer, cuda: FakeCuda) -> None:
    trainer = captured(make_trainer(short()))
    trainer.fit()
    assert not trainer.notes
    student, generator = cuda.captures
    assert student.where[1:] == generator.where[1:]
    assert student.where[0] == trainer.state.images.device


def test_discarded_graphs_release_their_memory_pool(make_trainer: MakeTrainer, cuda: FakeCuda) -> None:
    trainer = captured(make_trainer(short()))
    trainer.iterate()
    trainer.load_state_dict(copy.deepcopy(trainer.state_dict()))
    trainer.iterate()
    pools = [graph.pool() for graph in cuda.captures]
    assert len(pools) == 4
    assert pools[0] == pools[1] != pools[2] == pools[3]


def test_garbage_is_collected_between_warming_up_and_the_capture(
    make_trainer: MakeTrainer, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = captured(make_trainer(short()))
    monkeypatch.setattr(gc, "collect", lambda: cuda.events.append("collect"))
    trainer.steps.generator()
    assert cuda.events == ["wait", "wait", "collect", "capture"]


def test_gradients_of_a_capture_are_left_to_the_next_one(make_trainer: MakeTrainer, cuda: FakeCuda) -> None:
    trainer = captured(make_trainer(short()))
    trainer.steps.student(0)
    assert all(parameter.grad is None for parameter in trainer.student.parameters())


@pytest.mark.parametrize("capture", [False, True])
def test_cudnn_benchmark_is_enabled_in_warm_up_capture_and_eager_steps(
    make_trainer: MakeTrainer, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, capture: bool
) -> None:
    inside: list[bool] = []
    settling: list[torch.device] = []

    @contextmanager
    def benchmark(device: torch.device) -> Iterator[None]:
        settling.append(device)
        yield
        settling.remove(device)

    trainer = captured(make_trainer(short()), lambda: inside.append(bool(settling)))
    trainer.steps.capturing = capture
    monkeypatch.setattr(captures, "benchmark_convolutions", benchmark)
    trainer.steps.student(0)
    assert inside == [True] * (4 if capture else 1)


def test_a_learning_rate_that_a_graph_would_not_see_change_is_not_captured(make_trainer: MakeTrainer) -> None:
    state = make_trainer(short()).state
    apex = dataclasses.replace(state.method, student_optimizer=Optimizer(kind="apex_sgd"))
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    steps = Steps(dataclasses.replace(state, method=apex, images=on_gpu))
    assert not steps.capturing
    assert "learning rate" in state.notes[0]


def rehearsal(kind: str, *, steps_per_batch: int = 1, attention: float = 0.0) -> Method:
    options: dict[str, Any] = {"memory_bank": {"every": 1}, "vae": {"latent_dim": 8, "width": 4, "steps": 2}}
    return Method(
        loop=Loop(
            batch_size=8, epochs=2, iterations_per_epoch=1, student_steps=5, steps_per_batch=steps_per_batch, generator_pretraining=1
        ),
        engine=Engine(channels_last=False),
        objective={"one_hot": 1.0, "attention": attention, "hint": attention / 50},  # type: ignore[arg-type]
        replay={"kind": kind} | options,  # type: ignore[arg-type]
        student_optimizer=Optimizer(lr=0.01),
        generator_optimizer=Optimizer(lr=0.01),
    )


KINDS = ["none", "ema_generator", "memory_bank", "vae"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps_per_batch", [1, 2, 3, 9])
@pytest.mark.parametrize("attention", [0.0, 250.0])
def test_warm_up_runs_every_kind_of_step(
    make_trainer: MakeTrainer, cuda: FakeCuda, kind: str, steps_per_batch: int, attention: float
) -> None:
    warmed, run = (captured(make_trainer(rehearsal(kind, steps_per_batch=steps_per_batch, attention=attention))) for _ in range(2))
    warmed.steps.warm_up()
    run.fit()
    assert list(warmed.steps._captured) == list(run.steps._captured)


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_is_undone_with_every_replay(make_trainer: MakeTrainer, kind: str) -> None:
    warmed, untouched = (make_trainer(rehearsal(kind)) for _ in range(2))
    batch_sizes: list[int] = []
    warmed.student.register_forward_pre_hook(lambda _, inputs: batch_sizes.append(len(inputs[0])))
    warmed.steps.warm_up()
    assert max(batch_sizes) == 8 + (0 if kind == "none" else 8 if kind == "ema_generator" else 1)
    for trainer in (warmed, untouched):
        trainer.fit()
    assert_equal(*(without_times(trainer.state_dict()) for trainer in (warmed, untouched)))
