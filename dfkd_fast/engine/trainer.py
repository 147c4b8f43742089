"""The trainer: alternates student and generator steps, and can stop and continue at any iteration."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_fast.errors import DfkdError, NonFiniteLossError, first_line
from dfkd_fast.methods import EmaGenerator
from dfkd_fast.models import evaluating, freeze

from .device import Clock
from .fit import check_networks
from .method import Method
from .optim import build_optimizer, build_schedule
from .steps import Game, generator_step, student_step

__all__ = ["Epoch", "Trainer"]


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to."""

    number: int
    """From 1."""
    seconds: float
    """Of its student steps, generator steps and evaluation."""
    losses: dict[str, float]
    """Means over the epoch: the student's loss, and the generator's terms by name."""
    student_accuracy: float | None
    """What ``evaluate`` returned, in percent; None where it was not asked."""


class Trainer:
    """Distils a frozen teacher into a student, without data.

    Iterate over it for one :class:`Epoch` at a time, or call :meth:`fit`. Both go on from where it stands.

    Args:
        teacher: images (B, C, H, W) → logits (B, classes). Put in evaluation mode and frozen, in place.
        student: the same signature; trained in place.
        generator: one of :mod:`dfkd_fast.models`, or any module with an attribute ``latent_dim`` that maps
            z (B, latent_dim) to images (B, C, H, W); trained in place.
        method: the point on the three axes and the schedule; a :class:`~dfkd_fast.Recipe` is one.
        evaluate: called with the student every ``loop.evaluate_every`` epochs, returns its accuracy in
            percent. It is only reported: nothing is chosen by it.
        seed: of the latent vectors.
        device: where the networks are moved.
        on_iteration: called after every iteration, for a progress bar.

    Raises:
        DfkdError: the networks do not fit each other.
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
    ) -> None:
        self.method = method = method or Method()
        self.device = torch.device(device)
        self.evaluate = evaluate
        self.on_iteration = on_iteration
        self.teacher = self._place(freeze(teacher))
        self.student = self._place(student).train()
        self.generator = self._place(generator).train()
        self.ema_generator = EmaGenerator(generator, method.replay.ema_decay) if method.replay.kind == "ema_generator" else None
        self.student_optimizer = build_optimizer(method.student_optimizer, self.student.parameters())
        self.generator_optimizer = build_optimizer(method.generator_optimizer, self.generator.parameters())
        self.schedules = [
            build_schedule(method.student_optimizer, self.student_optimizer, method.loop.epochs),
            build_schedule(method.generator_optimizer, self.generator_optimizer, method.loop.epochs),
        ]
        self.fresh_stream = torch.Generator(self.device).manual_seed(seed)
        self.replay_stream = torch.Generator(self.device).manual_seed(seed + 2**32)
        self.clock = Clock(self.device)
        self.history: list[Epoch] = []
        self.iteration = 0
        """Iterations done of the epoch under way."""
        self.losses: dict[str, Tensor] = {}
        """Of the epoch under way, by term: (iterations_per_epoch, steps), on the device."""
        self._stopping = False
        self._game = self._set_up(check_networks(self.teacher, self.student, self.generator, self.device))

    @property
    def finished(self) -> bool:
        """Whether every epoch is done."""
        return len(self.history) == self.method.loop.epochs

    @property
    def iterations_done(self) -> int:
        """Iterations since the beginning of the run."""
        return len(self.history) * self.method.loop.iterations_per_epoch + self.iteration

    def fit(self) -> nn.Module:
        """Run the epochs that are left; returns the student."""
        for _ in self:
            pass
        return self.student

    def stop(self) -> None:
        """Ask a running loop to end after the iteration under way; may be called from a signal handler."""
        self._stopping = True

    def __iter__(self) -> Iterator[Epoch]:
        loop = self.method.loop
        self._stopping = False
        while not self.finished:
            while self.iteration < loop.iterations_per_epoch:
                if self._stopping:
                    self.check_finite()
                    return
                self._iterate()
                if self.on_iteration is not None:
                    self.on_iteration(self)
            yield self._close_epoch()

    def sample(self, count: int) -> Tensor:
        """Images (count, C, H, W) of the generator as it stands, always from the same latents; changes nothing."""
        stream = torch.Generator(self.device).manual_seed(0)
        latents = torch.randn(count, self._game.latents.shape[1], device=self.device, generator=stream)
        with evaluating(self.generator):
            return self.generator(latents)

    def mean_losses(self) -> dict[str, float]:
        """Means of the epoch under way, by term; waits for the device."""
        done = max(self.iteration, 1)
        return {name: float(values[:done].mean()) for name, values in self.losses.items()}

    def check_finite(self) -> None:
        """Look at the losses of the epoch under way; waits for the device.

        Raises:
            NonFiniteLossError: one is NaN or infinite; the message names the first, and nothing was saved since.
        """
        first: tuple[int, int, str, float] | None = None
        for name, values in self.losses.items():
            bad = (~values[: self.iteration].isfinite()).nonzero()
            if len(bad):
                row, column = bad[0].tolist()
                found = (row, column, name, float(values[row, column]))
                # Of one iteration, the student's steps come before the generator's.
                first = min(first, found, key=lambda at: (at[0], at[2] != "student")) if first else found
        if first is not None:
            row, column, name, value = first
            player = "student" if name == "student" else "generator"
            where = f"{player} step {column + 1} of iteration {row + 1}, epoch {len(self.history) + 1}"
            raise NonFiniteLossError(f"the {player}'s loss term {name!r} is {value} at {where}")

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to go on bit for bit: tensors, numbers and containers."""
        networks = {"student": self.student, "generator": self.generator}
        if self.ema_generator is not None:
            networks["ema_generator"] = self.ema_generator.network
        return {
            "networks": {name: network.state_dict() for name, network in networks.items()},
            "optimizers": [self.student_optimizer.state_dict(), self.generator_optimizer.state_dict()],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "streams": [self.fresh_stream.get_state(), self.replay_stream.get_state()],
            "torch_random_state": torch.get_rng_state(),
            "cuda_random_state": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "losses": self.losses,
            "iteration": self.iteration,
            "history": [asdict(epoch) for epoch in self.history],
            "seconds": self.clock.read(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that :meth:`state_dict` gave, of the same networks and method.

        Raises:
            DfkdError: it is the state of something else.
        """
        try:
            self.student.load_state_dict(state["networks"]["student"])
            self.generator.load_state_dict(state["networks"]["generator"])
            if self.ema_generator is not None:
                self.ema_generator.network.load_state_dict(state["networks"]["ema_generator"])
            for optimizer, saved in zip((self.student_optimizer, self.generator_optimizer), state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            for schedule, saved in zip(self.schedules, state["schedules"], strict=True):
                schedule.load_state_dict(saved)
            for stream, saved in zip((self.fresh_stream, self.replay_stream), state["streams"], strict=True):
                stream.set_state(saved)
            torch.set_rng_state(state["torch_random_state"])
            if state["cuda_random_state"] is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_random_state"], self.device)
            self.losses = {name: values.to(self.device, copy=True) for name, values in state["losses"].items()}
            self.iteration = state["iteration"]
            self.history = [Epoch(**epoch) for epoch in state["history"]]
            self.clock.seconds.update(state["seconds"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise DfkdError(f"the state is not of these networks and this method: {first_line(error)}") from error

    def _place(self, network: nn.Module) -> nn.Module:
        network.to(self.device)
        return network.to(memory_format=torch.channels_last) if self.method.loop.channels_last else network

    def _set_up(self, image_shape: torch.Size) -> Game:
        loop = self.method.loop
        replaying = self.ema_generator is not None and self.method.replay.weight > 0
        rows = loop.batch_size * (2 if replaying else 1)
        layout = torch.channels_last if loop.channels_last else torch.contiguous_format
        latents = torch.empty(loop.batch_size, int(self.generator.latent_dim), device=self.device)  # type: ignore[arg-type]
        return Game(
            teacher=self.teacher,
            student=self.student,
            generator=self.generator,
            ema_generator=self.ema_generator,
            method=self.method,
            student_optimizer=self.student_optimizer,
            generator_optimizer=self.generator_optimizer,
            latents=latents,
            replay_latents=torch.empty_like(latents),
            images=torch.empty(rows, *image_shape, device=self.device, memory_format=layout),
            fresh_stream=self.fresh_stream,
            replay_stream=self.replay_stream,
        )

    def _iterate(self) -> None:
        loop = self.method.loop
        with self.clock.phase("student"):
            for step in range(loop.student_steps):
                self._record("student", step, loop.student_steps, student_step(self._game))
        with self.clock.phase("generator"):
            for step in range(loop.generator_steps):
                for name, term in generator_step(self._game).items():
                    self._record(name, step, loop.generator_steps, term)
        self.iteration += 1

    def _record(self, name: str, step: int, steps: int, value: Tensor) -> None:
        if name not in self.losses:
            self.losses[name] = torch.zeros(self.method.loop.iterations_per_epoch, steps, device=self.device)
        self.losses[name][self.iteration, step] = value

    def _close_epoch(self) -> Epoch:
        self.check_finite()
        number = len(self.history) + 1
        losses = self.mean_losses()
        accuracy = None
        if self.evaluate is not None and (number % self.method.loop.evaluate_every == 0 or number == self.method.loop.epochs):
            with self.clock.phase("evaluation"):
                accuracy = self.evaluate(self.student)
        for schedule in self.schedules:
            schedule.step()
        seconds = math.fsum(self.clock.read().values()) - math.fsum(epoch.seconds for epoch in self.history)
        epoch = Epoch(number, seconds, losses, accuracy)
        self.history.append(epoch)
        self.iteration = 0
        return epoch
