"""The trainer: alternates student and generator steps, and can stop and continue at any iteration."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd_fast import distributed
from dfkd_fast.errors import DfkdError, NonFiniteLossError, first_line
from dfkd_fast.evaluation import Drift
from dfkd_fast.kernels import FusedEMA
from dfkd_fast.methods import build_memory
from dfkd_fast.models import (
    FoldingError,
    Generator,
    Observer,
    auxiliary_outputs,
    conditioned,
    evaluating,
    folded_and_checked,
    frozen_copy,
    fuse_leaky_relus,
    has_running_statistics,
    keep_spectral_norms_in_float32,
    logits_only,
    lower_precision,
    sha256_of,
    sharing_copy,
    use_cpu_convolutions,
)
from dfkd_fast.renamed import current_keys

from .capture import Steps, preserved
from .checkpoint import cpu_copy
from .compilation import Compiled
from .device import Clock, keep_freed_memory
from .fit import check_initialized, check_networks
from .method import Method, differences, method_to_dict, resolved
from .optim import build_optimizer, build_schedule, settle_rates
from .precision import Precision, ordinary_mode
from .steps import Game
from .streams import random_stream

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
    unaveraged_accuracy: float | None = None
    """The same of the student itself, where ``loop.student_ema_decay`` makes its average what is kept."""
    drift: dict[str, float] = field(default_factory=dict)
    """How far the student's predictions moved with the generators since the epoch before, where ``loop.drift_samples`` asks."""


class Trainer:
    """Distils a frozen teacher into a student, without data.

    Iterate over it for one :class:`Epoch` at a time, or call :meth:`fit`. Both go on from where it stands.

    Args:
        teacher: images (B, C, H, W) → logits (B, classes) or (B, classes, H, W), or a dict, tuple or object that has them (see
            :func:`~dfkd_fast.models.logits_of`); its weights are read here, once, where they are folded or cast.
        student: the same signature; its parameters and buffers are trained in place.
        generator: one of :mod:`dfkd_fast.models`, or any module with an attribute ``latent_dim`` that maps
            z (B, latent_dim) to images (B, C, H, W); trained in place, too.
        method: the point on the three axes and the schedule; a :class:`~dfkd_fast.Recipe` is one.
        evaluate: called with the student every ``loop.evaluate_every`` epochs, returns its accuracy in
            percent. It is only reported: nothing is chosen by it.
        seed: of the latent vectors.
        device: where the networks are moved.
        on_iteration: called after every iteration, for a progress bar.

    The networks are moved to the device and to the memory format of ``engine.channels_last``. What else is done to them for speed is
    done to copies of their modules that share their parameters, buffers and hooks: their classes and modes stay as they are, and
    setting a mode of :attr:`student` has no effect on the steps. What callbacks draw, switch off or freeze is undone after them; an
    ambient autocast, ``no_grad`` or inference mode does not reach the steps.

    Raises:
        DfkdError: the networks do not fit each other, or cannot be copied.
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
        self.device = torch.device(device)
        self.method = method = resolved(method or Method(), self.device)
        if method.engine.keep_memory and self.device.type == "cpu":
            keep_freed_memory()
        self.evaluate = evaluate
        self.on_iteration = on_iteration
        for role, network in (("teacher", teacher), ("student", student), ("generator", generator)):
            check_initialized(role, network)
        self.teacher, self.student, self.generator = map(self._place, (teacher, student, generator))
        distributed.broadcast_([tensor for network in (teacher, student, generator) for tensor in network.state_dict().values()])
        self.teacher_sha256 = sha256_of(teacher.state_dict())
        frozen = frozen_copy(teacher, torch.get_default_dtype())
        adversarial = method.objective.adversarial > 0
        shapes = check_networks(frozen, student, generator, self.device, adversarial=adversarial)
        self.average = FusedEMA(self.student, method.loop.student_ema_decay) if method.loop.student_ema_decay else None
        self.student_optimizer = build_optimizer(method.student_optimizer, self.student.parameters(), self.device)
        self.generator_optimizer = build_optimizer(method.generator_optimizer, self.generator.parameters(), self.device)
        self.schedules = [
            build_schedule(method.student_optimizer, self.student_optimizer, method.loop.epochs),
            build_schedule(method.generator_optimizer, self.generator_optimizer, method.loop.epochs),
        ]
        self.fresh_stream = random_stream(seed, "fresh", self.device)
        self.replay_stream = random_stream(seed, "replay", self.device)
        self.precision = Precision(method.engine.precision, self.device)
        self.remarks: list[str] = []
        """What was asked for and is done another way, a line each."""
        self.clock = Clock(self.device)
        self.history: list[Epoch] = []
        self.pretrained = 0
        """Steps the generator took before the first iteration."""
        self.iteration = 0
        """Iterations done of the epoch under way."""
        self.losses: dict[str, Tensor] = {}
        """Of the epoch under way, by term: (iterations_per_epoch, steps), on the device."""
        self._stopping = False
        self._game = self._set_up(frozen, *shapes, seed)
        self.memory = self._game.memory
        self._steps = Steps(self._game, method.engine.capture, self.remarks.append, Compiled(self._called_networks()))
        if method.engine.micro_batches > 1 and any(isinstance(layer, _BatchNorm) for layer in [*student.modules(), *generator.modules()]):
            self.remarks.append(
                "engine.micro_batches: batch norms in training see a piece of the batch, so gradients are not quite the whole's"
            )
        self.drift = Drift(method.loop.drift_samples)

    @property
    def finished(self) -> bool:
        """Whether every epoch is done."""
        return len(self.history) >= self.method.loop.epochs

    @property
    def iterations_done(self) -> int:
        """Iterations since the beginning of the run."""
        return len(self.history) * self.method.loop.iterations_per_epoch + self.iteration

    @property
    def result(self) -> nn.Module:
        """What is evaluated and kept: the student, or its average where ``loop.student_ema_decay`` asks for one."""
        return self.student if self.average is None else self.average.module

    def fit(self) -> nn.Module:
        """Run the epochs that are left; returns :attr:`result`."""
        for _ in self:
            pass
        return self.result

    def stop(self) -> None:
        """Ask a running loop to end after the iteration under way; may be called from a signal handler."""
        self._stopping = True

    def __iter__(self) -> Iterator[Epoch]:
        loop = self.method.loop
        self._stopping = False
        self._pretrain()
        while not self.finished:
            while self.iteration < loop.iterations_per_epoch:
                if distributed.any_of(self._stopping):
                    self.check_finite()
                    return
                self._iterate()
                if self.on_iteration is not None:
                    with self._undisturbed():
                        self.on_iteration(self)
            yield self._close_epoch()

    def warm_up(self) -> None:
        """Take every kind of step that the run has, in its order, and take them back: after that, none needs more GPU memory.

        Raises:
            torch.OutOfMemoryError: there is not enough.
        """
        loop, memory = self.method.loop, self.memory
        with preserved(self._game):
            if loop.generator_pretraining:
                self._steps.generator(adversarial=False)
            self._take_each_step()
            if memory is not None and not memory.ready:
                with memory.assumed_ready():
                    self._take_each_step()

    def _take_each_step(self) -> None:
        learning = 0 if self.memory is None else self.memory.steps
        for step in dict.fromkeys((0, min(learning, self.method.loop.student_steps - 1))):
            self._steps.student(step)
        self._steps.generator()

    def sample(self, count: int) -> Tensor:
        """Images (count, C, H, W) of the generator as it stands, always from the same latents; changes nothing."""
        return _sample(self._game.generator, count, self.device)

    def mean_losses(self) -> dict[str, float]:
        """Means of the epoch under way, by term; waits for the device."""
        done = max(self.iteration, 1)
        return {name: float(values[:done].mean()) for name, values in self.losses.items()}

    def check_finite(self) -> None:
        """Look at the losses of the epoch under way, in all processes; waits for the device.

        Raises:
            NonFiniteLossError: one is NaN or infinite; the message names the first, and nothing was saved since.
        """
        # A number that is none in one process is none in the mean, so that all of them stop.
        distributed.average_(list(self.losses.values()))
        first: tuple[int, int, str, float] | None = None
        for name, values in self.losses.items():
            bad = (~values[: self.iteration].isfinite()).nonzero()
            if len(bad):
                row, column = bad[0].tolist()
                found = (row, column, name, float(values[row, column]))
                first = min(first, found, key=self._moment) if first else found
        if first is not None:
            row, column, name, value = first
            player = "student" if name in self._student_columns else "generator"
            where = f"{player} step {column + 1} of iteration {row + 1}, epoch {len(self.history) + 1}"
            raise NonFiniteLossError(f"the {player}'s loss term {name!r} is {value} at {where}")

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to go on bit for bit: tensors, numbers and containers, as copies on the CPU. Changes nothing."""
        return cpu_copy(self._live_state())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that :meth:`state_dict` gave, of the same networks and method.

        Raises:
            DfkdError: it is the state of something else, such as of another teacher's student or of another schedule; then nothing
                has changed.
        """
        before = self.state_dict()
        try:
            self._check_state(state)
            self._load(state)
        except Exception as error:
            self._load(before)
            if isinstance(error, DfkdError):
                raise
            raise DfkdError(f"the state is not of these networks and this method: {first_line(error)}") from error

    def _live_state(self) -> dict[str, Any]:
        return {
            "teacher": self.teacher_sha256,
            "method": method_to_dict(self.method),
            "networks": {name: network.state_dict() for name, network in self._trained().items()},
            "memory": None if self.memory is None or self.memory.private else self.memory.state_dict(),
            "optimizers": [self.student_optimizer.state_dict(), self.generator_optimizer.state_dict()],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "processes": distributed.gathered([self._private_state()]),
            "precision": self.precision.state_dict(),
            "losses": self.losses,
            "drift": self.drift.state_dict(),
            "pretrained": self.pretrained,
            "iteration": self.iteration,
            "history": [asdict(epoch) for epoch in self.history],
            "seconds": self.clock.read(),
        }

    def _load(self, state: dict[str, Any]) -> None:
        self.precision.load_state_dict(state["precision"])
        for name, network in self._trained().items():
            network.load_state_dict(state["networks"][name])
        own = state["processes"][distributed.rank()]
        if self.memory is not None:
            self.memory.load_state_dict(own["memory"] if self.memory.private else state["memory"])
        for optimizer, saved in zip((self.student_optimizer, self.generator_optimizer), state["optimizers"], strict=True):
            optimizer.load_state_dict(copy.deepcopy(saved))  # it would keep the very tensors
            settle_rates(optimizer, self.device)
        for schedule, saved in zip(self.schedules, state["schedules"], strict=True):
            # The milestones are the method's: some checkpoints hold a miscounted copy, which is never reached.
            own_milestones = {name: value for name, value in schedule.state_dict().items() if name == "milestones"}
            schedule.load_state_dict(saved | own_milestones)
        for stream, saved in zip((self.fresh_stream, self.replay_stream), own["streams"], strict=True):
            stream.set_state(saved)
        torch.set_rng_state(own["torch_random_state"])
        if own["cuda_random_state"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda_random_state"], self.device)
        self.losses = {name: values.to(self.device, copy=True) for name, values in state["losses"].items()}
        if own.get("buffers") is not None:
            for buffer, saved in zip(self._own_buffers(), own["buffers"], strict=True):
                buffer.copy_(saved)
        if own["fresh"] is not None:
            for buffer, saved in zip((self._game.images, self._game.logits), own["fresh"], strict=True):
                buffer.copy_(saved)
        self.drift.load_state_dict(state["drift"], self.device)
        self.pretrained = state["pretrained"]
        self.iteration = state["iteration"]
        self.history = [Epoch(**epoch) for epoch in state["history"]]
        self.clock.seconds.update(state["seconds"])
        self._steps.forget()

    def _trained(self) -> dict[str, nn.Module]:
        networks: dict[str, nn.Module] = {"student": self.student, "generator": self.generator}
        return networks if self.average is None else networks | {"average": self.average}

    def _check_state(self, state: dict[str, Any]) -> None:
        """Raise a :class:`DfkdError` for a state that another teacher or schedule left; nothing is changed yet."""
        if (teacher := state.get("teacher")) is None:
            self.remarks.append("the checkpoint does not say which teacher it is of: whether it is this one was not checked")
        elif teacher != self.teacher_sha256:
            raise DfkdError(
                f"the state is of a run with another teacher: of sha256 {teacher[:12]}, and this one's is {self.teacher_sha256[:12]}"
            )
        # Not in states of before it was recorded.
        for path, theirs, ours in differences(current_keys(state.get("method", {}), "the state"), method_to_dict(self.method)):
            raise DfkdError(f"{path} = {ours!r}: the state is of a run with {theirs!r}")
        if len(state["processes"]) != distributed.world_size():
            raise DfkdError(f"the state is of {len(state['processes'])} processes, and here are {distributed.world_size()}")
        loop, epochs, iteration = self.method.loop, len(state["history"]), state["iteration"]
        if epochs > loop.epochs or (epochs == loop.epochs and iteration):
            raise DfkdError(f"loop.epochs = {loop.epochs}: the state has {epochs} epochs and {iteration} iterations done already")
        if iteration > loop.iterations_per_epoch or any(len(values) != loop.iterations_per_epoch for values in state["losses"].values()):
            raise DfkdError(
                f"loop.iterations_per_epoch = {loop.iterations_per_epoch}: the state is of a run with another number of iterations"
            )

    def _private_state(self) -> dict[str, Any]:
        """What every process has another one of."""
        bank = self.memory is not None and self.memory.private
        return {
            "streams": [self.fresh_stream.get_state(), self.replay_stream.get_state()],
            "torch_random_state": torch.get_rng_state(),
            "cuda_random_state": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "memory": self.memory.state_dict() if self.memory is not None and bank else None,
            "buffers": self._own_buffers() if distributed.world_size() > 1 else None,
            # A bank takes the last batch of an epoch in.
            "fresh": [self._game.images, self._game.logits] if bank else None,
        }

    def _own_buffers(self) -> list[Tensor]:
        """Running statistics, of which processes have different ones until an epoch ends: they have seen other images."""
        networks = [self.student, self.generator, *([] if self.average is None else [self.average])]
        networks += [] if self.memory is None else self.memory.networks
        return [buffer for network in networks for buffer in network.buffers() if buffer.is_floating_point()]

    def _place(self, network: nn.Module) -> nn.Module:
        """The network itself, on the device, in the memory format of the run."""
        network.to(self.device)
        return network.to(memory_format=torch.channels_last) if self.method.engine.channels_last else network

    def _adapt(self, network: nn.Module) -> nn.Module:
        """A working copy, in place as the steps are fastest with it; returns it."""
        keep_spectral_norms_in_float32(network)
        if self.device.type == "cpu" and self.method.engine.cpu_convolutions:
            use_cpu_convolutions(network)
        return network

    def _working_student(self, network: nn.Module) -> nn.Module:
        """A student or generator in training mode as the steps call it; it shares all tensors with the network."""
        working = self._adapt(sharing_copy(network)).train()
        if self.method.engine.sync_batch_norm and distributed.world_size() > 1:
            if self.device.type != "cuda":
                raise DfkdError("engine.sync_batch_norm = true: PyTorch's SyncBatchNorm works on GPUs only")
            working = nn.SyncBatchNorm.convert_sync_batchnorm(working)
        return working

    def _set_up(self, frozen: nn.Module, image_shape: torch.Size, logits_shape: torch.Size, seed: int) -> Game:
        loop, objective = self.method.loop, self.method.objective
        generator = self._working_student(self.generator)
        if self.method.engine.fuse_norm_act:
            fuse_leaky_relus(generator, every_norm=self.device.type == "cuda")
        embedding = getattr(generator, "embedding", None)
        if objective.class_nll and len(logits_shape) > 1:
            raise DfkdError(f"objective.class_nll = {objective.class_nll}: is of one class an image, and the teacher gives logits a pixel")
        if objective.conditional and embedding is None:
            raise DfkdError("objective.class_nll and objective.embedding_norm need a conditional generator (generator.conditional = true)")
        if embedding is not None and embedding.num_embeddings > logits_shape[0]:
            raise DfkdError(f"the generator has {embedding.num_embeddings} class embeddings, the teacher {logits_shape[0]} classes")
        layout = torch.channels_last if self.method.engine.channels_last else torch.contiguous_format
        rows = loop.batch_size + (self.method.replay.rows_of(loop.batch_size) if self.method.replay.replays else 0)
        images = torch.zeros(rows, *image_shape, device=self.device, dtype=self.precision.images).to(memory_format=layout)
        sample = _sample(generator, 4, self.device)
        teacher, student = self._working_teacher(frozen, sample), self._working_student(self.student)
        for role, network in (("teacher", frozen), ("student", student)):
            if (outputs := auxiliary_outputs(network, sample)) is not None:
                self.remarks.append(f"the {role} {outputs}")
        student = logits_only(student, sample)
        self.precision.keep_logits(student, sample)
        for role, network in (("teacher", teacher), ("student", student)):
            if self.precision.rounds_logits(network, sample):
                self.remarks.append(
                    f"engine.precision: the {role}'s logits are rounded to {self.precision.name}: its forward makes them, not a layer"
                )
        logits = torch.empty(rows, *logits_shape, device=self.device)
        if logits.ndim == 4:
            logits = logits.to(memory_format=layout)
        with torch.random.fork_rng(devices=self._random_devices):
            torch.manual_seed(seed)  # the same autoencoder whatever was drawn before
            fresh = slice(loop.batch_size)
            memory = build_memory(self.method.replay, generator, teacher, images[fresh], logits[fresh])
        return Game(
            teacher=teacher,
            observer=Observer(teacher, statistics=objective.bn_moments > 0, features=objective.activation > 0),
            student=student,
            generator=generator,
            memory=memory,
            average=self.average,
            method=self.method,
            precision=self.precision,
            student_optimizer=self.student_optimizer,
            generator_optimizer=self.generator_optimizer,
            latents=torch.empty(loop.batch_size, int(generator.latent_dim), device=self.device),  # type: ignore[arg-type]
            labels=torch.empty(loop.batch_size, dtype=torch.long, device=self.device),
            images=images,
            logits=logits,
            fresh_stream=self.fresh_stream,
            replay_stream=self.replay_stream,
        )

    def _working_teacher(self, frozen: nn.Module, images: Tensor) -> nn.Module:
        """The teacher as the steps call it: folded where that changes nothing, its weights in the run's precision."""
        teacher = logits_only(self._adapt(frozen), images)
        if self.method.engine.fold_teacher and any(map(has_running_statistics, teacher.modules())):
            try:
                teacher = self._adapt(self._place(folded_and_checked(teacher, images)))
            except FoldingError as error:
                self.remarks.append(f"the teacher's batch norms are not folded: {error}")
        if self.precision.dtype is not None:
            teacher = lower_precision(copy.deepcopy(teacher), self.precision.dtype, images)
        return teacher

    def _called_networks(self) -> Iterator[nn.Module]:
        """What the steps call and ``engine.compile`` asks to compile."""
        if not self.method.engine.compile:
            return
        game = self._game
        yield from (game.teacher, game.observer.network)
        if self.method.update.retains:
            self.remarks.append(f"the student is not compiled: update.kind {self.method.update.kind!r} differentiates it twice")
        else:
            yield game.student
        for generator in (game.generator, None if game.memory is None else game.memory.generator):
            if generator is not None:
                # The steps call the body of ours, and make its end a kernel of its own.
                yield generator.body if isinstance(generator, Generator) else generator

    def _pretrain(self) -> None:
        wanted = self.method.loop.generator_pretraining
        terms: dict[str, Tensor] = {}
        while self.pretrained < wanted and not distributed.any_of(self._stopping):
            with self.clock.phase("generator", memory=False), ordinary_mode(self.device):
                terms = self._steps.generator(adversarial=False)
            self.pretrained += 1
        distributed.average_(list(terms.values()))  # so that all processes stop
        for name, term in terms.items():
            if not term.isfinite():
                raise NonFiniteLossError(
                    f"the generator's loss term {name!r} is {term.item()} after {self.pretrained} steps of its pretraining"
                )
        if terms and self.pretrained == wanted and self.memory is not None:
            self.memory.start(self._game.generator)

    def _iterate(self) -> None:
        players = [self._student_steps, self._generator_steps]
        with ordinary_mode(self.device):
            for steps in reversed(players) if self.method.loop.generator_first else players:
                steps()
        self.iteration += 1

    def _student_steps(self) -> None:
        with self.clock.phase("student", memory=self.iteration == 0):
            for step in range(self.method.loop.student_steps):
                for name, loss in self._steps.student(step).items():
                    self._record(name, step, self._student_columns[name], loss)

    def _generator_steps(self) -> None:
        with self.clock.phase("generator", memory=self.iteration == 0):
            for step in range(self.method.loop.generator_steps):
                for name, term in self._steps.generator().items():
                    self._record(name, step, self.method.loop.generator_steps, term)

    @property
    def _student_columns(self) -> dict[str, int]:
        """How many steps of an iteration give which of the losses in the student's phase."""
        steps = self.method.loop.student_steps
        return {"student": steps, "vae": min(steps, self.method.replay.vae.steps)}

    def _moment(self, found: tuple[int, int, str, float]) -> tuple[int, bool, int]:
        """When in an epoch a loss was computed."""
        row, column, name, _ = found
        return row, (name in self._student_columns) == self.method.loop.generator_first, column

    def _record(self, name: str, step: int, steps: int, value: Tensor) -> None:
        if name not in self.losses:
            self.losses[name] = torch.zeros(self.method.loop.iterations_per_epoch, steps, device=self.device)
        self.losses[name][self.iteration, step] = value

    def _close_epoch(self) -> Epoch:
        self.check_finite()
        distributed.average_(self._own_buffers())
        number = len(self.history) + 1
        losses = self.mean_losses()
        accuracy = unaveraged = None
        with self.clock.phase("evaluation"):
            if self.evaluate is not None and (number % self.method.loop.evaluate_every == 0 or number == self.method.loop.epochs):
                with self._undisturbed():
                    accuracy = float(self.evaluate(self.result))
                    unaveraged = None if self.average is None else float(self.evaluate(self.student))
            drift = self._measure_drift()
        # From here on nothing raises: after an evaluation that did, the epoch is closed anew.
        if self.memory is not None:
            self.memory.end_epoch(number, self._game.fresh)
        with warnings.catch_warnings():
            # Resumed at an epoch's end, the optimisers have taken their steps in another process.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for schedule in self.schedules:
                schedule.step()
        seconds = math.fsum(self.clock.read().values()) - math.fsum(epoch.seconds for epoch in self.history)
        epoch = Epoch(number, seconds, losses, accuracy, unaveraged, drift)
        self.history.append(epoch)
        self.iteration = 0
        return epoch

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Whatever a callback inside does, afterwards random states, modes and what is to be trained are as before."""
        learning = [(tensor, tensor.requires_grad) for tensor in self._game.student.parameters()]
        learning += [(tensor, tensor.requires_grad) for tensor in self._game.generator.parameters()]
        try:
            with torch.random.fork_rng(devices=self._random_devices), torch.set_grad_enabled(torch.is_grad_enabled()):
                yield
        finally:
            for tensor, learns in learning:
                tensor.requires_grad_(learns)
            # Scripted modules are shared with the networks that a callback sees.
            self._game.student.train()
            self._game.generator.train()
            if self.average is not None:
                self.average.module.eval()

    @property
    def _random_devices(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []

    def _measure_drift(self) -> dict[str, float]:
        if not self.method.loop.drift_samples:
            return {}
        generators = {"generator": self._game.generator}
        if self.memory is not None and self.memory.generator is not None:
            generators["replay"] = self.memory.generator
        return self.drift.measure(self._game.student, generators)


def _sample(generator: nn.Module, count: int, device: torch.device) -> Tensor:
    """Images (count, C, H, W) in evaluation mode, always from the same latents."""
    stream = torch.Generator(device).manual_seed(0)
    latents = torch.randn(count, int(generator.latent_dim), device=device, generator=stream)  # type: ignore[arg-type]
    embedding = getattr(generator, "embedding", None)
    labels = torch.arange(count, device=device) % (1 if embedding is None else embedding.num_embeddings)
    with evaluating(generator):
        return generator(conditioned(generator, latents, labels))
