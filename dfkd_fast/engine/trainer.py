"""The trainer: alternates student and generator steps, and can stop and continue at any iteration."""

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_fast import distributed
from dfkd_fast.errors import DfkdError
from dfkd_fast.models import sample

from . import checkpoint
from .capture import Steps
from .epoch import Epoch
from .losses import check_pretraining
from .method import Method, resolved
from .precision import ordinary_mode
from .prepare import prepare
from .state import undisturbed

__all__ = ["Trainer"]

LOGGER = logging.getLogger(__name__)


class Trainer:
    """Distils a frozen teacher into a student, without data.

    Iterate over it for one :class:`Epoch` at a time, or call :meth:`fit`. Both go on from where it stands.

    Args:
        teacher: images (B, C, H, W) → logits (B, classes) or (B, classes, H, W), or a dict, tuple or object that has them (see
            :func:`~dfkd_fast.models.get_logits`); its weights are read here, once, where they are folded or cast.
        student: the same signature; its parameters and buffers are trained in place.
        generator: one of :mod:`dfkd_fast.models`, or any module with an attribute ``latent_dim`` that maps
            z (B, latent_dim) to images (B, C, H, W); trained in place, too.
        method: the point on the three axes and the schedule; a :class:`~dfkd_fast.Recipe` is one.
        evaluate: called with the student every ``loop.evaluate_every`` epochs, returns its accuracy in
            percent. It is only reported: nothing is chosen by it.
        seed: of the latent vectors.
        device: where the networks are moved.
        on_iteration: called after every iteration, for a progress bar.
        on_epoch: called with every epoch that is over.
        on_checkpoint: called where :meth:`state_dict` is worth saving: after every epoch, and when :meth:`stop` ends the loop.

    The networks are moved to the device and to the memory format of ``engine.channels_last``. What else is done to them for speed is
    done to copies of their modules that share their parameters, buffers and hooks: their classes and modes stay as they are, and
    setting a mode of :attr:`student` has no effect on the steps. What callbacks draw, switch off or freeze is undone after them; an
    ambient autocast, ``no_grad`` or inference mode does not reach the steps.

    Raises:
        DfkdError: the networks do not fit each other, the method or its batches, or cannot be copied.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        generator: nn.Module,
        method: Method | None = None,
        *,
        evaluate: Callable[[nn.Module], float] | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        on_iteration: Callable[["Trainer"], None] | None = None,
        on_epoch: Callable[["Trainer", Epoch], None] | None = None,
        on_checkpoint: Callable[["Trainer"], None] | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.method = resolved(method or Method(), self.device)
        self.teacher, self.student, self.generator = teacher, student, generator
        self.evaluate = evaluate
        self.on_iteration, self.on_epoch, self.on_checkpoint = on_iteration, on_epoch, on_checkpoint
        self.state = prepare(teacher, student, generator, self.method, seed=seed, device=self.device)
        self.steps = Steps(self.state)
        self._stopping = False

    @property
    def history(self) -> list[Epoch]:
        """The epochs that are over."""
        return self.state.history

    @property
    def notes(self) -> list[str]:
        """What was asked for and is done another way, a line each."""
        return self.state.notes

    @property
    def finished(self) -> bool:
        """Whether every epoch is done."""
        return len(self.history) >= self.method.loop.epochs

    @property
    def iterations_done(self) -> int:
        """Iterations since the beginning of the run."""
        return len(self.history) * self.method.loop.iterations_per_epoch + self.state.iteration

    @property
    def result(self) -> nn.Module:
        """What is evaluated and kept: the student, or its average where ``loop.student_ema_decay`` asks for one."""
        return self.student if self.state.average is None else self.state.average.module

    def fit(self) -> nn.Module:
        """Run the epochs that are left; returns :attr:`result`."""
        for _ in self:
            pass
        return self.result

    def stop(self) -> None:
        """Ask a running loop to end after the iteration under way; may be called from a signal handler."""
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
        """One iteration: the student's steps and the generator's, behind the generator's pretraining if that is left.

        Raises:
            DfkdError: the epoch under way has all of its iterations; iterating over the trainer closes it.
        """
        if self.finished or self.state.iteration >= self.method.loop.iterations_per_epoch:
            raise DfkdError("iterate(): no iteration is left of this epoch; iterate over the trainer, which closes epochs")
        self._pretrain()
        players = [self._student_steps, self._generator_steps]
        with ordinary_mode(self.device):
            for steps in reversed(players) if self.method.loop.generator_first else players:
                steps()
        self.state.iteration += 1

    def mean_losses(self) -> dict[str, float]:
        """Means of the epoch under way, by term; waits for the device."""
        return self.state.losses.means(self.state.iteration)

    def sample(self, count: int) -> Tensor:
        """Images (count, C, H, W) of the generator as it stands, always from the same latents; changes nothing."""
        return sample(self.state.generator, count, self.device)

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to go on bit for bit: tensors, numbers and containers, as copies on the CPU. Changes nothing."""
        return checkpoint.state_dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that :meth:`state_dict` gave, of the same networks and method.

        Raises:
            DfkdError: it is the state of something else, such as of another teacher's student or of another schedule; then nothing
                has changed.
        """
        try:
            checkpoint.load_state_dict(self.state, state)
        finally:
            self.steps.forget()

    def _pretrain(self) -> None:
        state, steps = self.state, self.method.loop.generator_pretraining
        terms: dict[str, Tensor] = {}
        while state.pretrained < steps and not distributed.any_rank(self._stopping):
            with state.clock.phase("generator", memory=False), ordinary_mode(self.device):
                terms = self.steps.generator(adversarial=False)
            state.pretrained += 1
        check_pretraining(terms, state.pretrained)
        if terms and state.pretrained == steps and state.replay_source is not None:
            state.replay_source.start(state.generator)

    def _student_steps(self) -> None:
        with self.state.clock.phase("student", memory=self.state.iteration == 0):
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
        accuracy = unaveraged = None
        with state.clock.phase("evaluation"):
            if self.evaluate is not None and (number % loop.evaluate_every == 0 or number == loop.epochs):
                with undisturbed(state):
                    accuracy = float(self.evaluate(self.result))
                    unaveraged = None if state.average is None else float(self.evaluate(self.student))
            drift = state.drift.measure(state.student, state.generators)
        # From here on nothing raises: after an evaluation that did, the epoch is closed anew.
        if state.replay_source is not None:
            state.replay_source.end_epoch(number, state.fresh)
        with warnings.catch_warnings():
            # Resumed at an epoch's end, the optimizers have taken their steps in another process.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for schedule in state.schedules:
                schedule.step()
        seconds = math.fsum(state.clock.read().values()) - math.fsum(epoch.seconds for epoch in self.history)
        epoch = Epoch(number, seconds, losses, accuracy, unaveraged, drift)
        self.history.append(epoch)
        state.iteration = 0
        LOGGER.debug("epoch %d of %d in %.3f s: %s; accuracy %s", number, loop.epochs, seconds, losses, accuracy)
        return epoch

    def _check_losses(self) -> None:
        self.state.losses.check_finite(self.state.iteration, len(self.history) + 1)

    def _call(self, callback: Callable[..., None] | None, *arguments: Any) -> None:
        if callback is not None:
            with undisturbed(self.state):
                callback(self, *arguments)
