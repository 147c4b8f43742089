"""Number of epochs that fit into ``loop.budget``, from the measured duration of an iteration, of an evaluation and of a report."""

import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn

from dfkd_fast import distributed
from dfkd_fast.errors import DfkdError
from dfkd_fast.settings import MAX_COUNT, seconds_of
from dfkd_fast.surgery import quantized_layers

from .agreement import agreement
from .calibration import calibrate_student
from .capture import Steps
from .clock import Clock
from .method import Loop, Method, resolved
from .precision import default_modes
from .prepare import prepare
from .state import TrainState, isolated_callback, preserved

__all__ = ["Durations", "epochs_within", "typical_seconds", "within_budget"]

AnyMethod = TypeVar("AnyMethod", bound=Method)
ITERATIONS_SECONDS = 5.0
"""Time for which iterations are measured."""
MAX_REPEATS = 1000


@dataclass(frozen=True)
class Durations:
    """Measured durations of the parts of a training, in seconds."""

    iteration: float
    evaluation: float = 0.0
    """Of the student, and of its average if there is one."""
    epoch_end: float = 0.0
    """Of every epoch besides its iterations and evaluations."""
    pretraining: float = 0.0
    """Of all pretraining steps of the generator."""
    start: float = 0.0
    """Of compiling and capturing the steps, and of calibrating a quantized student."""


def within_budget(
    teacher: nn.Module,
    student: nn.Module,
    generator: nn.Module,
    method: AnyMethod,
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    measure_agreement: bool = False,
    report: Callable[[TrainState], float] = lambda state: 0.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    teacher_trained: bool = True,
) -> tuple[AnyMethod, str]:
    """Computes ``loop.epochs`` from ``loop.budget``, for a :class:`~dfkd_fast.Trainer` with the same arguments.

    Iterations, a pretraining step of the generator and an evaluation are run and timed; weights and random states are restored. With
    several processes, all of them must call it, and the durations of the first one count.

    Args:
        teacher, student, generator, method, evaluate, measure_agreement, seed, device: As for :class:`~dfkd_fast.Trainer`.
        report: Returns the mean duration in seconds of what a caller does after every epoch, such as saving a checkpoint.
        teacher_trained: False if the teacher's weights are not trained yet.

    Returns:
        The method with ``loop.epochs`` computed and ``loop.budget`` empty, and one line that says what was measured. Durations differ
        between measurements, so keep the method to repeat or resume the training.

    Raises:
        DfkdError: The networks are incompatible with each other or the method, or the budget is shorter than one epoch.
    """
    budget, target = method.loop.budget, torch.device(device)
    method = replace(method, loop=replace(method.loop, budget=""))
    with torch.random.fork_rng(devices=[target] if target.type == "cuda" else []):
        measured = resolved(method, target)
        state = prepare(teacher, student, generator, measured, seed=seed, device=target, teacher_trained=teacher_trained)
        durations = _measure(state, teacher, evaluate, measure_agreement, report)
    del state
    if target.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    durations = distributed.all_gather([durations])[0]
    epochs = epochs_within(budget, method.loop, durations)
    line = (
        f"budget {budget}: {durations.iteration:.3g} s/iteration measured,"
        f" {epochs} {'epoch' if epochs == 1 else 'epochs'} of {method.loop.iterations_per_epoch} iterations"
    )
    return replace(method, loop=replace(method.loop, epochs=epochs)), line


def epochs_within(budget: str, loop: Loop, durations: Durations) -> int:
    """Returns the largest number of epochs of a training, with the generator's pretraining and all evaluations, within a budget.

    Args:
        budget: Duration such as ``"40min"``.
        loop: Schedule of the training; its ``epochs`` are ignored.
        durations: Of the parts of the training.

    Raises:
        DfkdError: The budget is shorter than one epoch.
    """
    before = durations.start + durations.pretraining
    # The last epoch is evaluated whatever its number.
    last = durations.evaluation if loop.evaluate_every > 1 else 0.0
    per_epoch = loop.iterations_per_epoch * durations.iteration + durations.epoch_end + durations.evaluation / loop.evaluate_every
    epochs = int((seconds_of(budget) - before - last) / per_epoch)
    if epochs < 1:
        pretraining = f" after {before:.3g} s of generator pretraining and start-up" if before else ""
        adjustable = ["loop.iterations_per_epoch", *(["loop.generator_pretraining"] if loop.generator_pretraining else [])]
        raise DfkdError(
            f"loop.budget = {budget!r}: one epoch of {loop.iterations_per_epoch} iterations takes {per_epoch + last:.3g} s{pretraining};"
            f" increase the budget or decrease {' or '.join(adjustable)}"
        )
    return min(epochs, MAX_COUNT)


def typical_seconds(call: Callable[[], object], device: torch.device, measured: float = 1.0) -> float:
    """Returns the mean duration of a call in seconds; the first call counts only if there is no time to repeat it.

    With several processes, all of them must call it, and repeat the call equally often.

    Args:
        call: Called once, and then repeatedly.
        device: Device that it runs on.
        measured: Time for which it is repeated, in seconds.
    """

    def seconds(repeats: int) -> float:
        clock = Clock(device)
        with clock.phase("calls"):
            for _ in range(repeats):
                call()
        return clock.read()["calls"]

    first: float = distributed.all_gather([seconds(1)])[0]
    repeats = min(int(measured / max(first, 1e-6)), MAX_REPEATS)
    return seconds(repeats) / repeats if repeats else first


def _measure(
    state: TrainState,
    teacher: nn.Module,
    evaluate: Callable[[nn.Module], float] | None,
    measure_agreement: bool,
    report: Callable[[TrainState], float],
) -> Durations:
    loop, steps = state.method.loop, Steps(state)

    def pretraining_step() -> None:
        with default_modes(state.device):
            steps.generator(adversarial=False)

    def iteration() -> None:
        """As in the trainer, with what it does around the steps."""
        with default_modes(state.device):
            for step in range(loop.student_steps):
                state.losses.record(steps.student(step), 0, step)
            for step in range(loop.generator_steps):
                state.losses.record(steps.generator(), 0, step)
        distributed.any_rank(False)
        with isolated_callback(state):
            pass

    def evaluation() -> None:
        if measure_agreement:
            agreement(state)
        if evaluate is None:
            return
        with isolated_callback(state):
            evaluate(state.saved_networks["student"])
            if state.average is not None:
                evaluate(state.average.module)

    with preserved(state):
        clock = Clock(state.device)
        with default_modes(state.device):
            with clock.phase("compilation"):
                steps.compile()
            with clock.phase("warm-up"):
                steps.warm_up()
        seconds = clock.read()
        start = seconds["compilation"] + (seconds["warm-up"] if steps.capturing else 0.0)
        if quantized_layers(state.student):
            start += typical_seconds(lambda: calibrate_student(state, teacher), state.device, 0.0)
        # Before the steps: an untrained teacher may make them diverge, and networks with values that are not finite are not evaluated.
        per_evaluation = typical_seconds(evaluation, state.device)
        drift = typical_seconds(lambda: state.drift.measure(state.student, state.generators), state.device) if loop.drift_samples else 0.0
        epoch_end = drift + report(state)
        pretraining = loop.generator_pretraining * typical_seconds(pretraining_step, state.device) if loop.generator_pretraining else 0.0
        source = state.replay_source
        # A source that is empty in the first epoch replays in all others.
        with nullcontext() if source is None or source.ready else source.assumed_ready():
            per_iteration = typical_seconds(iteration, state.device, ITERATIONS_SECONDS)
        return Durations(per_iteration, per_evaluation, epoch_end, pretraining, start)
