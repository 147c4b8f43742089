"""The number of epochs that fit into a budget, by a clock that only steps and evaluations move."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from dfkd_fast import DfkdError, Loop, Method, Objective, Optimizer, Trainer, distributed, within_budget
from dfkd_fast.engine import budget, capture, clock, steps
from dfkd_fast.engine.budget import Durations, epochs_within, typical_seconds
from dfkd_fast.settings import seconds_of
from tests.engine.test_distributed import together
from tests.engine.test_methods_run import REPLAYS
from tests.engine.test_methods_run import method as method_of
from tests.small import small_method, small_networks
from tests.states import assert_equal

STUDENT_STEP, GENERATOR_STEP, EVALUATION = 2.0, 1.0, 7.0


class Time:
    """Stands in for the module ``time`` of the clock."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def taking(self, seconds: float, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            self.now += seconds
            return call(*arguments, **options)

        return timed


@pytest.fixture
def fake_time(monkeypatch: pytest.MonkeyPatch) -> Time:
    """Time that passes in steps only: 2 s for one of the student, 1 s for one of the generator."""
    time = Time()
    monkeypatch.setattr(clock, "time", time)
    monkeypatch.setattr(budget, "MAX_REPEATS", 2)  # of what takes no time
    monkeypatch.setattr(capture, "student_step", time.taking(STUDENT_STEP, steps.student_step))
    monkeypatch.setattr(capture, "generator_step", time.taking(GENERATOR_STEP, steps.generator_step))
    return time


def with_loop(method: Method, **changes: Any) -> Method:
    return replace(method, loop=replace(method.loop, **changes))


def test_epochs_fill_the_budget_with_iterations_and_evaluations(fake_time: Time) -> None:
    method = with_loop(small_method(iterations=3, student_steps=2), budget="90s")
    evaluate = fake_time.taking(EVALUATION, lambda student: 50.0)
    # an epoch: 3 × (2 × 2 + 1) + 7 = 22 s
    computed, line = within_budget(*small_networks(), method, evaluate=evaluate)
    assert line == "budget 90s: 5 s/iteration measured, 4 epochs of 3 iterations"
    assert computed.loop == replace(method.loop, epochs=4, budget="")

    unevaluated, _ = within_budget(*small_networks(), method)  # 15 s
    assert unevaluated.loop.epochs == 6


def test_the_average_of_the_student_is_evaluated_as_well(fake_time: Time) -> None:
    method = with_loop(small_method(iterations=3, student_steps=2), budget="90s", student_ema_decay=0.9)
    computed, _ = within_budget(*small_networks(), method, evaluate=fake_time.taking(EVALUATION, lambda student: 50.0))
    assert computed.loop.epochs == 90 // (15 + 2 * 7)


def test_the_pretraining_of_the_generator_and_reports_are_part_of_the_budget(fake_time: Time) -> None:
    method = replace(small_method(iterations=2, student_steps=2), objective=Objective(one_hot=1.0))
    method = with_loop(method, budget="1min40s", generator_pretraining=20)
    computed, _ = within_budget(*small_networks(), method, report=lambda state: 6.0)
    assert computed.loop.epochs == (100 - 20 * 1) // (2 * 5 + 6)


@pytest.mark.parametrize("replay", REPLAYS)
def test_a_training_is_the_same_as_with_the_number_of_epochs(replay: str, fake_time: Time) -> None:
    method = method_of(replay=replay, epochs=2)
    networks = small_networks()
    torch.manual_seed(5)
    random_state = torch.get_rng_state()
    states = [copy.deepcopy(network.state_dict()) for network in networks]
    computed, _ = within_budget(*networks, with_loop(method, epochs=40, budget="25s"), seed=1)  # 10 s an epoch
    assert computed == method
    assert torch.equal(torch.get_rng_state(), random_state)
    for network, state in zip(networks, states, strict=True):
        assert_equal(network.state_dict(), state)
    trainers = [Trainer(*networks, computed, seed=1), Trainer(*small_networks(), method, seed=1)]
    for trainer in trainers:
        trainer.fit()
    assert_equal(trainers[0].student.state_dict(), trainers[1].student.state_dict())


@pytest.mark.parametrize(
    ("evaluate_every", "durations", "epochs"),
    [
        (1, Durations(iteration=1.0), 6),
        (1, Durations(iteration=1.0, evaluation=10.0), 3),
        (5, Durations(iteration=1.0, evaluation=10.0), 4),  # (60 − 10) / (10 + 2)
        (1, Durations(iteration=1.0, epoch_end=5.0), 4),
        (1, Durations(iteration=1.0, pretraining=20.0, start=10.0), 3),
        (1, Durations(iteration=6.0), 1),
        (1, Durations(iteration=1e-12), 2**31 - 1),
    ],
)
def test_epochs_within(evaluate_every: int, durations: Durations, epochs: int) -> None:
    assert epochs_within("1min", Loop(iterations_per_epoch=10, evaluate_every=evaluate_every), durations) == epochs


def test_a_budget_shorter_than_an_epoch_is_refused_with_what_an_epoch_takes() -> None:
    with pytest.raises(DfkdError, match=r"loop.budget = '1min': one epoch of 10 iterations takes 61 s; increase the budget or decrease"):
        epochs_within("1min", Loop(iterations_per_epoch=10), Durations(iteration=6.1))
    with pytest.raises(DfkdError, match="takes 20 s after 50 s of generator pretraining and start-up; increase"):
        epochs_within("1min", Loop(iterations_per_epoch=10), Durations(iteration=2.0, pretraining=50.0))


def test_a_call_that_takes_long_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    time = Time()
    monkeypatch.setattr(clock, "time", time)
    calls: list[int] = []

    def call() -> None:
        calls.append(len(calls))
        time.now += 3.0 if len(calls) == 1 else 0.25

    assert typical_seconds(call, torch.device("cpu"), measured=2.0) == 3.0
    assert len(calls) == 1
    assert typical_seconds(call, torch.device("cpu"), measured=2.0) == 0.25
    assert len(calls) == 1 + 1 + 8


def check_first_decides() -> None:
    # Each process has durations of its own, and the others would give other numbers of repetitions and epochs.
    calls: list[int] = []
    time = Time()
    setattr(clock, "time", time)  # noqa: B010

    def call() -> None:
        calls.append(0)
        time.now += 0.25 * (1 + distributed.rank())

    typical_seconds(call, torch.device("cpu"), measured=1.0)
    assert len(calls) == 1 + 4
    budget._measure = lambda *_: Durations(iteration=1.0 + distributed.rank())
    method, _ = within_budget(*small_networks(), with_loop(small_method(iterations=3), budget="30s"))
    assert method.loop.epochs == 10


def test_the_first_of_several_processes_decides() -> None:
    together(2, check_first_decides)


def test_a_trainer_names_the_function_that_computes_its_epochs() -> None:
    with pytest.raises(DfkdError, match=r"loop.budget = '40min': a Trainer needs loop.epochs, which within_budget\(\) computes"):
        Trainer(*small_networks(), with_loop(small_method(), budget="40min"))


@pytest.mark.parametrize("name", ["student_optimizer", "generator_optimizer"])
def test_milestones_and_a_budget_are_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=f"loop.budget = '40min': not supported with {name}.schedule 'multistep'"):
        Method(loop=Loop(budget="40min"), **{name: Optimizer(schedule="multistep", milestones=(10,))})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("40min", 2400), ("1.5h", 5400), ("2h30min", 9000), ("1h0min30s", 3630), ("0.5min", 30)]
)
def test_durations(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    "value", ["40", "40 min", "min", "-5min", "1.2.3s", ".s", "0s", "0.5s", "9000h", "9" * 400 + "h", "30s2min", 40, None]
)
def test_other_text_is_no_duration(value: Any) -> None:
    with pytest.raises(ValidationError, match=r"must be a duration from 1s to 8760h, such as 90s, 40min, 1\.5h or 2h30min"):
        Loop(budget=value)


def test_a_loss_that_is_not_finite_does_not_fail_the_measurement(fake_time: Time) -> None:
    method = replace(with_loop(small_method(iterations=3), budget="90s"), student_optimizer=Optimizer(lr=1e30))
    networks = small_networks()

    def evaluate(network: nn.Module) -> float:
        assert all(torch.isfinite(value).all() for value in network.state_dict().values())
        return 0.0

    assert within_budget(*networks, method, evaluate=evaluate)[0].loop.epochs == 6
    assert all(torch.isfinite(value).all() for network in networks for value in network.state_dict().values())


def test_the_student_is_evaluated_as_it_was_given(fake_time: Time) -> None:
    teacher, student, generator = small_networks()
    evaluated: list[nn.Module] = []

    def evaluate(network: nn.Module) -> float:
        evaluated.append(network)
        fake_time.now += EVALUATION
        return 0.0

    within_budget(teacher, student, generator, with_loop(small_method(), budget="90s"), evaluate=evaluate)
    assert evaluated == [student]
