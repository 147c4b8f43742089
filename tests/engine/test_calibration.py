import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from dfkd_fast import DfkdError, GeneratorA, Loop, Method, Objective, Replay, Trainer, Update, within_budget
from dfkd_fast.engine import budget
from dfkd_fast.engine.calibration import calibrate_student
from dfkd_fast.surgery import FLOAT, fold, quantize
from tests.small import Networks, small_method
from tests.states import assert_equal, through_a_file, without_times

MakeTrainer = Callable[..., Trainer]


def classifier(bias: bool = False, width: int = 4) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, stride=2, bias=bias), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    layers += [nn.Conv2d(width, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10)]
    return nn.Sequential(*layers)


def networks(*, weight_bits: int = 4, activation_bits: int = 8) -> Networks:
    """A teacher with trained running statistics, its quantized copy, and a generator."""
    torch.manual_seed(0)
    teacher = classifier()
    for _ in range(5):
        teacher(torch.randn(8, 1, 16, 16))
    student = copy.deepcopy(teacher)
    quantize(student, torch.randn(4, 1, 16, 16), weight_bits=weight_bits, activation_bits=activation_bits)
    return teacher, student, GeneratorA(5, 1, 16, width=4)


def pretraining_method(**settings: Any) -> Method:
    method = replace(small_method(**settings), objective=Objective(bn_moments=1.0, features=10.0))
    return replace(method, loop=replace(method.loop, generator_pretraining=2, student_ema_decay=0.5))


def running_statistics(network: nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for name, buffer in network.named_buffers() if "running" in name]


def test_a_quantized_student_is_calibrated_once_after_the_pretraining_and_before_the_first_iteration(make_trainer: MakeTrainer) -> None:
    events: list[str] = []
    trainer = make_trainer(pretraining_method(), networks=networks())
    uncalibrated = copy.deepcopy(trainer.student.state_dict())
    calibrated: dict[str, Any] = {}

    def on_calibration(trainer: Trainer) -> None:
        events.append("calibration")
        assert (trainer.state.pretrained, trainer.iterations_done) == (2, 0)
        calibrated.update(copy.deepcopy(trainer.student.state_dict()))
        assert_equal(dict(trainer.result.state_dict()), calibrated)
        assert trainer.result is not trainer.student
        calibrate_student(trainer.state, trainer.teacher)  # of the pretrained generator's samples: gives the same again
        assert_equal(dict(trainer.student.state_dict()), calibrated)

    trainer.on_pretraining = lambda trainer, terms: events.append("pretraining")
    trainer.on_calibration = on_calibration
    trainer.on_iteration = lambda trainer: events.append("iteration")
    trainer.fit()
    trainer.fit()
    assert events == [*2 * ["pretraining"], "calibration", *6 * ["iteration"]]
    assert not torch.equal(calibrated["1.running_mean"], uncalibrated["1.running_mean"])
    assert torch.equal(calibrated["1.weight"], uncalibrated["1.weight"])
    assert not torch.equal(trainer.student.state_dict()["0.weight"], calibrated["0.weight"])


@pytest.mark.parametrize("stop_after", ["pretraining step 1", "pretraining", "calibration", "iteration 1", "epoch 1"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(make_trainer: MakeTrainer, stop_after: str) -> None:
    method = pretraining_method()
    whole, stopped = (make_trainer(method, networks=networks()) for _ in range(2))
    whole.fit()

    def stop_if(reached: bool) -> None:
        if reached:
            stopped.stop()

    stopped.on_pretraining = lambda trainer, _: stop_if(f"pretraining step {trainer.state.pretrained}" == stop_after)
    stopped.on_calibration = lambda trainer: stop_if(stop_after in ("pretraining", "calibration"))
    stopped.on_iteration = lambda trainer: stop_if(trainer.iterations_done == {"iteration 1": 1, "epoch 1": 3}.get(stop_after))
    before: list[Any] = []
    if stop_after == "pretraining":  # a state from between the pretraining and the calibration
        stopped.on_pretraining = lambda trainer, _: before.append(trainer.state_dict())
    stopped.fit()
    state = through_a_file(before[-1] if before else stopped.state_dict())
    assert state["pretrained"] == (1 if stop_after == "pretraining step 1" else 2)

    calls: list[int] = []
    resumed = make_trainer(method, seed=50, networks=networks(), on_calibration=lambda trainer: calls.append(trainer.iterations_done))
    torch.manual_seed(99)
    resumed.load_state_dict(state)
    resumed.fit()
    assert calls == ([0] if stop_after.startswith("pretraining") else [])
    assert_equal(without_times(resumed.state_dict()), without_times(whole.state_dict()))


def test_a_state_from_before_the_calibration_can_be_loaded_into_a_trainer_that_has_calibrated(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(pretraining_method(), networks=networks())
    start = trainer.state_dict()
    trainer.fit()
    finished = trainer.state_dict()
    trainer.load_state_dict(start)
    trainer.fit()
    assert_equal(without_times(trainer.state_dict()), without_times(finished))


def test_a_student_that_is_not_quantized_is_not_calibrated(make_trainer: MakeTrainer) -> None:
    teacher, _, generator = networks()
    trainer = make_trainer(small_method(), networks=(teacher, copy.deepcopy(teacher), generator))
    before = copy.deepcopy(dict(trainer.student.state_dict()))
    trainer.on_calibration = lambda trainer: pytest.fail("calibrated")
    trainer._pretrain()
    assert_equal(dict(trainer.student.state_dict()), before)
    trainer.fit()
    assert not torch.equal(trainer.student.state_dict()["1.running_mean"], before["1.running_mean"])


@pytest.mark.parametrize(
    ("teacher", "layer"),
    [
        (lambda original: classifier(width=5), "0"),
        (lambda original: nn.Sequential(nn.Flatten(), nn.Linear(256, 10)), "0"),
        (lambda original: nn.Sequential(*original[:7], nn.Sequential(original[7])), "7"),
        (lambda original: fold(original.eval()), "0"),
        (lambda original: nn.Sequential(original[0], nn.Identity(), *original[2:]), "1"),
        (lambda original: nn.Sequential(*original[:7], nn.Linear(36, 10, bias=False)), "7"),
    ],
)
def test_a_quantized_student_that_is_no_copy_of_the_teacher_is_refused_in_one_line(
    make_trainer: MakeTrainer, teacher: Callable[[Any], nn.Module], layer: str
) -> None:
    original, student, generator = networks()
    message = f"the student is quantized, and its layer {layer!r} differs from the teacher's: quantize a copy of the teacher"
    with pytest.raises(DfkdError, match=f"^{message}$"):
        make_trainer(small_method(), networks=(teacher(original), student, generator))


def test_within_budget_leaves_the_tensors_of_the_student_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student, generator = networks()
    before = copy.deepcopy(dict(student.state_dict()))
    monkeypatch.setattr(budget, "ITERATIONS_SECONDS", 0.0)
    method = pretraining_method()
    computed, _ = within_budget(teacher, student, generator, replace(method, loop=replace(method.loop, budget="1h")))
    assert computed.loop.epochs > 1
    assert_equal(dict(student.state_dict()), before)


@pytest.mark.parametrize("channels_last", [False, True])
def test_running_statistics_and_ranges_do_not_change_in_training(make_trainer: MakeTrainer, channels_last: bool) -> None:
    trainer = make_trainer(small_method(channels_last=channels_last), networks=networks())
    trainer.iterate()
    before, weight = [buffer.clone() for buffer in trainer.student.buffers()], trainer.student.state_dict()["3.weight"].clone()
    trainer.fit()
    assert_equal(list(trainer.student.buffers()), before)
    assert not torch.equal(trainer.student.state_dict()["3.weight"], weight)
    assert all(parameter.isfinite().all() for parameter in trainer.student.parameters())


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(4, 8), (FLOAT, 8), (4, FLOAT)])
@pytest.mark.parametrize(
    "changes",
    [
        {"update": Update(kind="second-order", inner_lr=0.01), "replay": Replay(kind="ema_generator")},
        {"objective": Objective(attention=10.0, hint=1.0)},
        {"objective": Objective(features=10.0)},
    ],
    ids=["second-order", "feature maps", "features"],
)
def test_second_order_updates_and_features_train_a_quantized_student(
    make_trainer: MakeTrainer, changes: dict[str, Any], weight_bits: int, activation_bits: int
) -> None:
    made = networks(weight_bits=weight_bits, activation_bits=activation_bits)
    trainer = make_trainer(replace(small_method(epochs=1), **changes), networks=made)
    statistics: list[torch.Tensor] = []
    trainer.on_calibration = lambda trainer: statistics.extend(running_statistics(trainer.student))
    trainer.fit()
    for name, parameter in trainer.student.named_parameters():
        assert parameter.isfinite().all()
        assert not torch.equal(parameter, made[1].state_dict()[name])
    assert_equal(running_statistics(trainer.student), statistics)


def test_the_students_loss_grows_by_the_weight_of_the_features(make_trainer: MakeTrainer) -> None:
    losses = []
    for weight in (0.0, 10.0, 20.0):
        method = pretraining_method()
        trainer = make_trainer(replace(method, objective=replace(method.objective, features=weight)), networks=networks(weight_bits=3))
        trainer.on_calibration = lambda trainer: losses.append(float(trainer.steps.student(0)["student"]))
        trainer._pretrain()
    assert losses[1] - losses[0] > 1e-3
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-3)


def test_without_generator_steps_the_generator_stays_as_it_was_pretrained(make_trainer: MakeTrainer) -> None:
    method = pretraining_method()
    trainer = make_trainer(replace(method, loop=replace(method.loop, generator_steps=0)), networks=networks())
    pretrained: dict[str, Any] = {}
    trainer.on_calibration = lambda trainer: pretrained.update(copy.deepcopy(trainer.generator.state_dict()))
    student = copy.deepcopy(dict(trainer.student.state_dict()))
    trainer.fit()
    assert [set(epoch.losses) for epoch in trainer.history] == 2 * [{"student"}]
    assert trainer.notes == ["objective.adversarial = 1 has no effect, because loop.generator_steps is 0"]
    after = trainer.generator.state_dict()
    kept = [name for name in pretrained if not name.endswith("num_batches_tracked")]
    assert any(name.endswith("running_mean") for name in kept)
    assert_equal({name: after[name] for name in kept}, {name: pretrained[name] for name in kept})
    assert all(norm.momentum == 0.1 for norm in trainer.generator.modules() if isinstance(norm, nn.BatchNorm2d))
    assert not torch.equal(trainer.student.state_dict()["0.weight"], student["0.weight"])


def test_a_generator_that_would_never_be_trained_is_refused() -> None:
    with pytest.raises(ValidationError, match="generator_steps = 0: the generator would never be trained"):
        Method(loop=Loop(generator_steps=0))
