"""The trainer, which alternates student and generator steps and can be stopped and resumed after any iteration."""

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_fast import distributed
from dfkd_fast.errors import DfkdError
from dfkd_fast.methods import bn_moments_norm
from dfkd_fast.models import sample
from dfkd_fast.surgery import keep_running_statistics, quantized_layers

from . import checkpoint
from .agreement import agreement
from .calibration import calibrate_student
from .capture import Steps
from .epoch import Epoch
from .losses import check_pretraining
from .method import Method, resolved
from .precision import default_modes
from .prepare import prepare
from .state import isolated_callback

__all__ = ["Trainer"]

LOGGER = logging.getLogger(__name__)


class Trainer:
    """Distills a frozen teacher into a student without data.

    Iterating over the trainer yields one :class:`Epoch` at a time; :meth:`fit` runs all remaining epochs. Both continue from the
    current state.

    The networks are moved to the device and to the memory format of ``engine.channels_last``. All other optimizations are applied to
    copies of the modules that share parameters, buffers and hooks, so the classes and modes of the networks do not change, and
    setting the mode of :attr:`student` does not affect the steps. After a callback, random states, modes, grad mode and
    ``requires_grad`` are restored. The steps are not affected by a surrounding autocast, ``no_grad`` or inference mode.

    Args:
        teacher: Maps images (B, C, H, W) to logits (B, classes) or (B, classes, H, W), or to a dict, tuple or object that contains
            them (see :func:`~dfkd_fast.surgery.get_logits`). Its weights are read once, here, if they are folded or cast.
        student: Network with the same inputs and outputs. Its parameters and buffers are trained in place. A copy of the teacher that
            :func:`~dfkd_fast.surgery.quantize` has quantized is calibrated on generated samples before the first iteration.
        generator: Generator of :mod:`dfkd_fast.models`, or any module with an integer attribute ``latent_dim`` that maps
            z (B, latent_dim) to images (B, C, H, W). Trained in place.
        method: Configuration; a :class:`~dfkd_fast.Recipe` is accepted. Defaults to ``Method()``.
        evaluate: Returns the accuracy of a student in percent; called every ``loop.evaluate_every`` epochs. The accuracy is reported
            only and does not affect the training.
        measure_agreement: Measure :attr:`Epoch.agreement` with the teacher, which needs no data, every ``loop.evaluate_every`` epochs.
        seed: Seed of the latents.
        device: Device to which the networks are moved.
        on_pretraining: Called with the trainer and the generator's loss terms, 0-d tensors by name, after every step of the generator's
            pretraining, whose number is ``trainer.state.pretrained``.
        on_calibration: Called with the trainer when a quantized student has been calibrated, before the first iteration.
        on_iteration: Called with the trainer after every iteration.
        on_epoch: Called with the trainer and the :class:`Epoch` after every epoch.
        on_checkpoint: Called with the trainer when :meth:`state_dict` should be saved: after every epoch, and when :meth:`stop` ends
            the loop.

    Raises:
        DfkdError: The networks are incompatible with each other, the method or its batch sizes, or cannot be copied; or the method has
            a ``loop.budget``, from which :func:`~dfkd_fast.within_budget` computes ``loop.epochs``.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        generator: nn.Module,
        method: Method | None = None,
        *,
        evaluate: Callable[[nn.Module], float] | None = None,
        measure_agreement: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        on_pretraining: Callable[["Trainer", dict[str, Tensor]], None] | None = None,
        on_calibration: Callable[["Trainer"], None] | None = None,
        on_iteration: Callable[["Trainer"], None] | None = None,
        on_epoch: Callable[["Trainer", Epoch], None] | None = None,
        on_checkpoint: Callable[["Trainer"], None] | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.method = resolved(method or Method(), self.device)
        if budget := self.method.loop.budget:
            raise DfkdError(f"loop.budget = {budget!r}: a Trainer needs loop.epochs, which within_budget() computes")
        self.teacher, self.student, self.generator = teacher, student, generator
        self.evaluate, self.measure_agreement = evaluate, measure_agreement
        self.on_pretraining, self.on_calibration, self.on_iteration = on_pretraining, on_calibration, on_iteration
        self.on_epoch, self.on_checkpoint = on_epoch, on_checkpoint
        self.state = prepare(teacher, student, generator, self.method, seed=seed, device=self.device)
        self.steps = Steps(self.state)
        self._stopping = False

    @property
    def history(self) -> list[Epoch]:
        """Completed epochs."""
        return self.state.history

    @property
    def notes(self) -> list[str]:
        """One line for each requested optimization that could not be applied, or that was applied differently."""
        return self.state.notes

    @property
    def remarks(self) -> list[str]:
        """Former name of :attr:`notes`."""
        warnings.warn("Trainer.remarks is now called Trainer.notes", FutureWarning, stacklevel=2)
        return self.notes

    @property
    def finished(self) -> bool:
        """Whether all epochs are complete."""
        return len(self.history) >= self.method.loop.epochs

    @property
    def iterations_done(self) -> int:
        """Number of completed iterations since the start of the run."""
        return len(self.history) * self.method.loop.iterations_per_epoch + self.state.iteration

    @property
    def result(self) -> nn.Module:
        """Network that is evaluated and saved: the student, or its exponential moving average if ``loop.student_ema_decay`` is set."""
        return self.student if self.state.average is None else self.state.average.module

    def fit(self) -> nn.Module:
        """Runs the remaining epochs.

        Returns:
            The trained network, :attr:`result`.
        """
        for _ in self:
            pass
        return self.result

    def stop(self) -> None:
        """Stops a running loop after the current iteration. Safe to call from a signal handler."""
        self._stopping = True

    def __iter__(self) -> Iterator[Epoch]:
        self._stopping = False
        self._pretrain()
        while not self.finished:
            while self.state.iteration < self.method.loop.iterations_per_epoch:
                if distributed.any_rank(self._stopping):
                    self._check_losses()
                    self._call(self.on_checkpoint)
                    return
                self.iterate()
                self._call(self.on_iteration)
            epoch = self._close_epoch()
            self._call(self.on_epoch, epoch)
            self._call(self.on_checkpoint)
            yield epoch

    def iterate(self) -> None:
        """Runs one iteration of student steps and generator steps, after the generator's pretraining if it is not complete.

        Raises:
            DfkdError: All iterations of the current epoch are done. Iterating over the trainer ends the epoch.
        """
        if self.finished or self.state.iteration >= self.method.loop.iterations_per_epoch:
            raise DfkdError("iterate(): all iterations of this epoch are done; iterate over the trainer, which ends epochs")
        self._pretrain()
        phases = [self._student_steps, self._generator_steps]
        with default_modes(self.device):
            for run_steps in reversed(phases) if self.method.loop.generator_first else phases:
                run_steps()
        self.state.iteration += 1
        if self.state.replay_source is not None:
            self.state.replay_source.end_iteration(self.iterations_done, self.state.fresh_batch)

    def mean_losses(self) -> dict[str, float]:
        """Returns the mean of each loss over the current epoch so far, by name. Synchronizes the device."""
        return self.state.losses.means(self.state.iteration)

    def sample(self, count: int) -> Tensor:
        """Returns images (count, C, H, W) of the current generator for fixed latents, without side effects."""
        return sample(self.state.generator, count, self.device)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the training, from which :meth:`load_state_dict` resumes bit for bit.

        It consists of tensors, numbers and containers, all copied to the CPU. With several processes, all of them must call it.
        """
        return checkpoint.state_dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a state returned by :meth:`state_dict` for the same networks and method.

        Raises:
            DfkdError: The state belongs to other networks, another teacher or other settings. The trainer is unchanged in that case.
        """
        try:
            checkpoint.load_state_dict(self.state, state)
        finally:
            self.steps.reset()

    def _compile(self) -> None:
        """Compiles the networks of ``engine.compile``, before the first step of this process."""
        if self.steps.uncompiled and not self.finished:
            with self.state.clock.phase("compilation"), default_modes(self.device):
                self.steps.compile()

    def _pretrain(self) -> None:
        self._compile()
        state, steps = self.state, self.method.loop.generator_pretraining
        terms: dict[str, Tensor] = {}
        while state.pretrained < steps and not distributed.any_rank(self._stopping):
            with state.clock.phase("generator", memory=False), default_modes(self.device):
                terms = self.steps.generator(adversarial=False)
            state.pretrained += 1
            self._call(self.on_pretraining, terms)
        check_pretraining(terms, state.pretrained)
        if terms and state.pretrained == steps and state.replay_source is not None:
            state.replay_source.start(state.generator)
        if state.pretrained == steps and not state.calibrated and quantized_layers(self.student):
            with state.clock.phase("calibration"):
                calibrate_student(state, self.teacher)
            state.calibrated = True
            self._call(self.on_calibration)

    def _student_steps(self) -> None:
        # Samples for plots, calibration and agreement are drawn with running statistics.
        trained = self.method.loop.generator_steps > 0
        statistics = nullcontext() if trained else keep_running_statistics(self.state.generator)
        with self.state.clock.phase("student", memory=self.state.iteration == 0), statistics:
            for step in range(self.method.loop.student_steps):
                self.state.losses.record(self.steps.student(step), self.state.iteration, step)

    def _generator_steps(self) -> None:
        with self.state.clock.phase("generator", memory=self.state.iteration == 0):
            for step in range(self.method.loop.generator_steps):
                self.state.losses.record(self.steps.generator(), self.state.iteration, step)

    def _close_epoch(self) -> Epoch:
        state, loop, number = self.state, self.method.loop, len(self.history) + 1
        self._check_losses()
        distributed.average_(state.running_statistics())
        losses = self.mean_losses()
        accuracy = unaveraged = agreed = None
        with state.clock.phase("evaluation"):
            is_due = number % loop.evaluate_every == 0 or number == loop.epochs
            if is_due and self.measure_agreement:
                agreed = agreement(state)
            if is_due and self.evaluate is not None:
                with isolated_callback(state):
                    accuracy = float(self.evaluate(self.result))
                    unaveraged = None if state.average is None else float(self.evaluate(self.student))
            drift = state.drift.measure(state.student, state.generators)
        # Nothing below raises: if the evaluation above raises, the epoch is ended again by the next call.
        if state.replay_source is not None:
            state.replay_source.end_epoch(number, state.fresh_batch)
        with warnings.catch_warnings():
            # After resuming at the end of an epoch, the optimizers' steps were taken in another process.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for schedule in state.schedules:
                schedule.step()
        seconds = math.fsum(state.clock.read().values()) - math.fsum(epoch.seconds for epoch in self.history)
        relative = self._relative_bn_moments(losses)
        epoch = Epoch(number, seconds, losses, accuracy, unaveraged, agreement=agreed, drift=drift, relative_bn_moments=relative)
        self.history.append(epoch)
        state.iteration = 0
        LOGGER.debug("epoch %d of %d in %.3f s: %s; accuracy %s", number, loop.epochs, seconds, losses, accuracy)
        return epoch

    def _relative_bn_moments(self, losses: dict[str, float]) -> float | None:
        """Returns :attr:`Epoch.relative_bn_moments` from the mean losses of the epoch."""
        state, weight = self.state, self.method.objective.bn_moments
        if "bn_moments" not in losses:
            return None
        if state.observer.running is None:  # resumed at the end of an epoch
            with torch.no_grad(), default_modes(self.device), state.precision.autocast():
                state.observer(state.images[:1])
        assert state.observer.running is not None
        return losses["bn_moments"] / (weight * float(bn_moments_norm(state.observer.running)))

    def _check_losses(self) -> None:
        self.state.losses.check_finite(self.state.iteration, len(self.history) + 1)

    def _call(self, callback: Callable[..., None] | None, *arguments: Any) -> None:
        if callback is not None:
            with isolated_callback(self.state):
                callback(self, *arguments)
