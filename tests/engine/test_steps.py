import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_fast import Loop, Method, Objective, Replay, Trainer
from dfkd_fast.engine.steps import _draw_batch, generator_step, student_step
from dfkd_fast.engine.streams import random_stream
from dfkd_fast.methods import EmaGeneratorSettings
from tests.small import small_method, small_networks

MakeTrainer = Callable[..., Trainer]


def changed(network: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(network.state_dict())


def test_student_step_trains_the_student_and_moves_only_the_generators_statistics(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(small_method())
    teacher, student, generator = map(snapshot, (trainer.teacher, trainer.student, trainer.generator))
    student_step(trainer.state)
    assert changed(trainer.student, student) == set(student)
    assert changed(trainer.teacher, teacher) == set()
    statistics = {name for name in generator if "running" in name or "tracked" in name}
    assert changed(trainer.generator, generator) == statistics
    assert all(parameter.grad is None for parameter in [*trainer.generator.parameters(), *trainer.teacher.parameters()])


def test_generator_step_computes_no_weight_gradient_of_teacher_or_student(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(small_method())
    student = snapshot(trainer.student)
    generator_step(trainer.state)
    assert all(parameter.grad is None for parameter in [*trainer.student.parameters(), *trainer.teacher.parameters()])
    assert all(parameter.grad is not None for parameter in trainer.generator.parameters())
    assert changed(trainer.student, student) == set()


@pytest.mark.parametrize(("mode", "moved"), [("train", True), ("eval", False)])
def test_student_mode_in_the_generator_step_decides_whether_its_statistics_move(make_trainer: MakeTrainer, mode: str, moved: bool) -> None:
    networks = small_networks(teacher="wrn10_1", student="wrn10_1", channels=3)
    method = Method(loop=Loop(batch_size=4, student_in_generator_step=mode))  # type: ignore[arg-type]
    trainer = make_trainer(method, networks=networks)
    student = snapshot(trainer.student)
    generator_step(trainer.state)
    assert bool(changed(trainer.student, student)) is moved
    assert trainer.student.training


def test_every_batch_norm_of_student_and_generator_is_updated_k_plus_1_times_an_iteration(make_trainer: MakeTrainer) -> None:
    networks = small_networks(teacher="wrn10_1", student="wrn10_1", channels=3)
    trainer = make_trainer(small_method(student_steps=3, epochs=1, iterations=1), networks=networks)
    trainer.fit()
    for network in (trainer.student, trainer.generator):
        counts = {int(value) for name, value in network.state_dict().items() if name.endswith("num_batches_tracked")}
        assert counts == {4}


def gradient_of_generator(trainer: Trainer) -> Tensor:
    generator_step(trainer.state)
    return torch.cat([parameter.grad.flatten() for parameter in trainer.generator.parameters() if parameter.grad is not None])


def test_generators_gradient_depends_on_the_student(make_trainer: MakeTrainer) -> None:
    ours = small_networks()
    other = (ours[0], small_networks(seed=9)[1], ours[2])
    gradients = [gradient_of_generator(make_trainer(small_method(), networks=networks)) for networks in (ours, other)]
    assert gradients[0].abs().sum() > 0
    assert not torch.allclose(gradients[0], gradients[1])


def test_the_adversarial_gradient_vanishes_for_a_student_equal_to_its_teacher(make_trainer: MakeTrainer) -> None:
    teacher, _, generator = small_networks(teacher="lenet5", student="lenet5")
    trainer = make_trainer(small_method(), networks=(teacher, copy.deepcopy(teacher), generator))
    assert generator_step(trainer.state)["adversarial"].item() == 0.0
    assert all((parameter.grad == 0).all() for parameter in trainer.generator.parameters() if parameter.grad is not None)


def test_the_generator_maximizes_the_discrepancy_that_the_student_minimizes(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(Method(loop=Loop(batch_size=64), objective=Objective(adversary="l1")))
    latents = torch.randn(64, 20)

    def discrepancy() -> float:
        with torch.no_grad():
            images = trainer.generator(latents)
            return (trainer.student(images) - trainer.teacher(images)).abs().mean().item()

    before = discrepancy()
    for _ in range(20):
        generator_step(trainer.state)
    assert discrepancy() > before


def test_replay_of_share_zero_equals_no_replay_bit_for_bit(make_trainer: MakeTrainer) -> None:
    plain = make_trainer(small_method())
    weightless = make_trainer(small_method(replay=Replay(kind="ema_generator", share=0.0)))
    plain.fit()
    weightless.fit()
    assert [epoch.losses for epoch in plain.history] == [epoch.losses for epoch in weightless.history]
    for ours, theirs in zip(plain.student.parameters(), weightless.student.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_replayed_rows_come_from_the_averaged_generator_and_a_stream_of_their_own(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(small_method(replay=Replay(kind="ema_generator"), batch_size=4))
    recorded: list[Tensor] = []
    trainer.teacher.register_forward_pre_hook(lambda _, inputs: recorded.append(inputs[0].clone()))
    student_step(trainer.state)
    assert trainer.state.replay_source is not None and trainer.state.replay_source.generator is not None
    z = torch.randn(4, 20, generator=random_stream(3, "replay", torch.device("cpu")))
    assert recorded[0].shape[0] == 8
    torch.testing.assert_close(recorded[0][4:], trainer.state.replay_source.generator(z))


def test_averaged_generator_is_never_trained_and_follows_each_generator_step(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(small_method(replay=Replay(kind="ema_generator", ema_generator=EmaGeneratorSettings(decay=0.7))))
    assert trainer.state.replay_source is not None and trainer.state.replay_source.generator is not None
    expected = {name: tensor.double() for name, tensor in snapshot(trainer.generator).items()}
    for _ in range(3):
        student_step(trainer.state)
        generator_step(trainer.state)
        for name, tensor in trainer.generator.state_dict().items():
            expected[name] = 0.7 * expected[name] + 0.3 * tensor.double() if tensor.is_floating_point() else tensor.double()
    for name, tensor in trainer.state.replay_source.generator.state_dict().items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in trainer.state.replay_source.generator.parameters())


@pytest.mark.parametrize("kind", ["none", "ema_generator", "memory_bank"])
def test_steps_per_batch_keeps_the_fresh_samples_and_draws_new_replayed_ones(make_trainer: MakeTrainer, kind: str) -> None:
    options: Any = {"every": 1, "every_unit": "iterations", "draw": "samples", "cached_logits": True}
    replay = Replay(kind=kind, rows=5, memory_bank=options)
    trainer = make_trainer(small_method(replay=replay, student_steps=5, steps_per_batch=2, iterations=2))
    trainer.iterate()  # fills the bank
    state = trainer.state
    fresh_rows = len(state.latents)
    drawn, tracked = [], state.generator.state_dict()["body.2.num_batches_tracked"]
    runs_before = int(tracked)
    for step in range(5):
        student_step(state, step)
        drawn.append((state.images.clone(), state.logits.clone()))
    assert int(tracked) - runs_before == 3
    for step in range(1, 5):
        (previous, _), (images, logits) = drawn[step - 1], drawn[step]
        assert torch.equal(images[:fresh_rows], previous[:fresh_rows]) is (step % 2 == 1)
        if kind != "none":
            assert not torch.equal(images[fresh_rows:], previous[fresh_rows:])
        # A teacher of half rounded images.
        tolerance = 1e-2 if kind == "memory_bank" else 1e-5
        with torch.no_grad():
            torch.testing.assert_close(logits, trainer.teacher(images), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("cached", "rows"), [(False, 13), (True, 8)])
def test_attention_maps_are_the_teachers_for_the_rows_that_it_labels(make_trainer: MakeTrainer, cached: bool, rows: int) -> None:
    bank: Any = {"every": 1, "every_unit": "iterations", "draw": "samples", "storage": "float32", "cached_logits": cached}
    method = small_method(replay=Replay(kind="memory_bank", rows=5, memory_bank=bank), student_steps=4, steps_per_batch=2)
    networks = small_networks(teacher="wrn10_2", student="wrn10_1", channels=3)
    trainer = make_trainer(replace(method, objective=Objective(attention=250.0)), networks=networks)
    trainer.iterate()  # fills the bank
    attention = trainer.state.features
    assert attention is not None
    for step in range(4):
        student_step(trainer.state, step)
        assert len(_draw_batch(trainer.state, fresh=False).feature_parts) == (1 if cached else 2)
        batch = _draw_batch(trainer.state, fresh=step == 2)
        assert batch.teacher_features is not None and len(batch.teacher_features) == rows
        with torch.no_grad():
            torch.testing.assert_close(batch.teacher_features, attention.teacher(batch.images[:rows])[1])


@pytest.mark.parametrize(("term", "weight"), [("attention", 3000.0), ("hint", 10.0)])
def test_comparing_features_pulls_the_students_to_the_teachers(make_trainer: MakeTrainer, term: str, weight: float) -> None:
    method = small_method(batch_size=16)
    losses = []
    for factor in (1e-6, 1.0):
        networks = small_networks(teacher="wrn10_2", student="wrn10_1", channels=3)
        trainer = make_trainer(replace(method, objective=Objective(**{term: factor * weight})), networks=networks)  # type: ignore[arg-type]
        for _ in range(15):
            student_step(trainer.state)
        state = trainer.state
        assert state.features is not None
        with torch.no_grad():
            distance = state.features.student(state.images)[1] - state.features.teacher(state.images)[1]
        losses.append(float(distance.square().sum(1).mean()) / factor)
    assert losses[1] < 0.5 * losses[0]


def test_the_teacher_and_the_generator_do_not_run_in_a_step_on_the_same_samples(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(small_method(student_steps=4, steps_per_batch=4))
    calls: list[str] = []
    trainer.state.teacher.register_forward_pre_hook(lambda *_: calls.append("teacher"))
    trainer.state.generator.register_forward_pre_hook(lambda *_: calls.append("generator"))
    trainer.state.generator.get_submodule("body").register_forward_pre_hook(lambda *_: calls.append("generator"))
    losses = [float(student_step(trainer.state, step)["student"]) for step in range(4)]
    assert sorted(calls) == ["generator", "teacher"]
    assert losses[3] < losses[0]
