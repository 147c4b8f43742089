"""What is timed: the plain loop, eager and compiled, and the engine with one feature after another."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from typing_extensions import override

from dfkd_fast import DfkdError, Recipe, Trainer
from dfkd_fast.choices import PrecisionName
from dfkd_fast.engine.clock import Clock
from dfkd_fast.engine.device import reuse_freed_memory
from dfkd_fast.engine.optim import build_optimizer
from dfkd_fast.kernels import use_backend
from dfkd_fast.methods import EmaGeneratorSettings
from dfkd_fast.models import build_generator, build_model

from ..baselines import plain

__all__ = ["Contender", "Times", "build", "check", "contenders", "networks"]

Times = list[tuple[float, float]]
"""For each iteration, the seconds of the student's steps and of all steps."""
MANY = 100_000
"""Iterations of a contender's one epoch: more than are ever timed."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Contender:
    """A way to run a recipe that can be timed."""

    run: Callable[[int], Times]
    """Run so many whole iterations back to back; waits for the device only where the contender itself does."""
    student_optimizer: torch.optim.Optimizer
    autocast: PrecisionName = "fp32"
    """What its networks compute in."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """What the engine does differently from what was asked."""
    captured: bool = False
    """Whether its steps are to be replayed as CUDA graphs."""
    holds: Callable[[], bool] = lambda: True
    """Whether it runs as it should: False where its steps could not be captured."""


class Marks:
    """Points in a device's work; on a GPU they are events, so that the host does not wait for them.

    Args:
        device: whose work it is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._moments: list[Any] = []

    def set(self) -> None:
        """Mark the end of the work that was submitted so far."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._moments.append(event)
        else:
            self._moments.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the seconds between each mark and the next, and remove the marks; waits for the device."""
        moments, self._moments = self._moments, []
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return [begin.elapsed_time(end) / 1000 for begin, end in itertools.pairwise(moments)]
        return [end - begin for begin, end in itertools.pairwise(moments)]


class _MarkingClock(Clock):
    """A trainer's clock that also marks the end of every phase."""

    def __init__(self, device: torch.device, marks: Marks) -> None:
        super().__init__(device)
        self._marks = marks

    @override
    @contextmanager
    def phase(self, name: str, *, memory: bool = True) -> Iterator[None]:
        with super().phase(name, memory=memory):
            yield
        self._marks.set()


def check(recipe: Recipe) -> None:
    """Check that the plain loop implements a recipe's method.

    Raises:
        DfkdError: it does not.
    """
    objective = recipe.objective
    known = objective.discrepancy == objective.adversary and objective.discrepancy in ("l1", "kl") and objective.temperature == 1.0
    others = (objective.one_hot, objective.entropy, objective.activation, objective.class_nll, objective.embedding_norm)
    known &= not any(others) and objective.adversarial == 1.0
    known &= recipe.replay.kind in ("none", "ema_generator") and recipe.replay.rows == 0 and recipe.update.kind == "plain"
    known &= recipe.loop.generator_steps == 1 and not recipe.loop.generator_first
    if not known:
        raise DfkdError(f"--recipe {recipe.name!r}: the plain loop knows L1 or KL, with or without BN moments and an averaged generator")


def contenders(
    recipe: Recipe,
    device: torch.device,
    precision: PrecisionName,
    *,
    compiled_engine: bool = False,
    keep_memory: bool = True,
    graphs: bool | None = None,
) -> dict[str, Callable[[], Contender]]:
    """Return what builds each contender, by name: the plain ones, then the engine with one feature more each.

    Args:
        recipe: what is run; its networks are untrained.
        device: where.
        precision: of the engine and of the compiled plain loop.
        compiled_engine: whether the engine under torch.compile is one of them.
        keep_memory: on a CPU, whether those that let malloc keep freed memory really do.
        graphs: whether CUDA graphs are one of the features; by default on a GPU only. On a CPU they change nothing. The engine without them
            is then called ``engine, eager``.
    """
    builders: dict[str, Callable[[], Contender]] = {
        "plain": lambda: _plain(recipe, device, "fp32", compiled=False),
        "plain_compiled": lambda: _plain(recipe, device, precision, compiled=True),
    }
    if device.type == "cpu":
        builders["plain, memory kept"] = lambda: _plain(recipe, device, "fp32", compiled=False, keep_memory=keep_memory)
    switches = ("channels_last", "cpu_convolutions", "keep_memory", "fold_teacher", "capture")
    textbook = {"textbook": True, "kernels": False, "engine.precision": "fp32"} | {f"engine.{name}": False for name in switches}
    # What each adds to those before it.
    features: list[tuple[str, dict[str, Any]]] = [
        ("+ no wasted work", textbook),
        ("+ channels-last", {"engine.channels_last": True}),
        ("+ transposed convolution", {"textbook": False}),
        ("+ fused kernels", {"kernels": True}),
        ("+ folded teacher", {"engine.fold_teacher": True}),
    ]
    if device.type == "cpu":
        features[2:2] = [
            ("+ chosen algorithms", {"engine.cpu_convolutions": True}),
            ("+ kept memory", {"engine.malloc_reuse": keep_memory}),
        ]
    if precision != "fp32":
        features.append(("+ precision", {"engine.precision": precision}))
    if graphs or (graphs is None and device.type == "cuda"):
        features[-1] = ("engine, eager", features[-1][1])
        features.append(("+ CUDA graphs", {"engine.capture": True}))
    features[-1] = ("engine", features[-1][1])
    if compiled_engine:
        features.append(("engine, compiled", {"engine.compile": True}))
    changes: dict[str, Any] = {}
    for name, switched in features:
        changes = changes | switched
        builders[name] = partial(_engine, recipe, device, changes)
    return builders


def build(recipe: Recipe, device: torch.device, precision: PrecisionName, name: str, **options: Any) -> Contender:
    """Build the contender of a name; for the options see :func:`contenders`."""
    return contenders(recipe, device, precision, **options)[name]()


def networks(recipe: Recipe) -> tuple[Any, Any, Any]:
    """Return the recipe's teacher, student and generator, untrained and always with the same weights."""
    torch.manual_seed(0)
    data = recipe.data
    teacher, student = (build_model(name, data.num_classes, data.channels) for name in (recipe.teacher.model, recipe.student.model))
    generator = build_generator(
        recipe.generator, data.channels, data.image_size, mean=data.mean, std=data.std, num_classes=data.num_classes
    )
    return teacher, student, generator


def _engine(recipe: Recipe, device: torch.device, changes: dict[str, Any]) -> Contender:
    teacher, student, generator = networks(recipe)
    if changes["textbook"]:
        plain.textbook(generator)
    kernels: bool = changes["kernels"]
    endless = {"loop.epochs": 1, "loop.iterations_per_epoch": MANY, "loop.generator_pretraining": 0}
    trainer = Trainer(teacher, student, generator, _changed(recipe, changes | endless), device=device)
    marks = Marks(device)
    trainer.state.clock = _MarkingClock(device, marks)
    captured = device.type == "cuda" and trainer.method.engine.capture

    def run(iterations: int) -> Times:
        with nullcontext() if kernels else use_backend("reference"):
            marks.set()
            for _ in range(iterations):
                trainer.iterate()
        phases = marks.seconds()
        trainer.state.clock.read()  # clears its own events
        return [(student, student + generator) for student, generator in zip(phases[::2], phases[1::2], strict=True)]

    return Contender(
        run,
        trainer.state.student_optimizer,
        trainer.state.precision.name,
        trainer.notes,
        captured,
        holds=lambda: trainer.steps.capturing == captured,
    )


def _plain(recipe: Recipe, device: torch.device, precision: PrecisionName, *, compiled: bool, keep_memory: bool = False) -> Contender:
    if keep_memory:
        reuse_freed_memory()
    teacher, student, generator = (network.to(device) for network in networks(recipe))
    plain.textbook(generator)
    teacher.requires_grad_(True)
    if compiled:
        # Not network.compile(): it compiles nothing of a Sequential, nor of the copy of the generator that MAD averages.
        teacher, student, generator = (
            torch.compile(network.to(memory_format=torch.channels_last), dynamic=False) for network in (teacher, student, generator)
        )
    # For a CPU: PyTorch's plain ones, not fused, wherever they run.
    student_optimizer = build_optimizer(recipe.student_optimizer, student.parameters(), torch.device("cpu"))
    generator_optimizer = build_optimizer(recipe.generator_optimizer, generator.parameters(), torch.device("cpu"))
    iterations: Iterator[plain.Iteration] = plain.distil(
        teacher,
        student,
        generator,
        student_optimizer=student_optimizer,
        generator_optimizer=generator_optimizer,
        epochs=1,
        iterations_per_epoch=MANY,
        batch_size=recipe.loop.batch_size,
        latent_dim=recipe.generator.latent_dim,
        student_steps=recipe.loop.student_steps,
        ema_decay=recipe.replay.table(EmaGeneratorSettings).decay if recipe.replay.replays else None,
        fresh_weight=recipe.replay.fresh_weight,
        replay_weight=recipe.replay.weight,
        discrepancy=recipe.objective.discrepancy,  # type: ignore[arg-type]  # checked
        bn_moments=recipe.objective.bn_moments,
        student_in_generator_step=recipe.loop.student_in_generator_step,
        device=device,
    )
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    if precision != "fp32":
        # Around a whole iteration: cached casts of weights would miss the optimizers' steps.
        autocast = partial(torch.autocast, device.type, DTYPES[precision], cache_enabled=False)
    marks = Marks(device)

    def run(count: int) -> Times:
        students = []
        marks.set()
        for _ in range(count):
            with autocast():
                students.append(next(iterations).student_seconds)  # the host's, which has waited for the loss of the last step
            marks.set()
        return list(zip(students, marks.seconds(), strict=True))

    return Contender(run, student_optimizer, precision)


def _changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    sections: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        section, dot, key = path.partition(".")
        if dot:
            sections.setdefault(section, {})[key] = value
    return dataclasses.replace(recipe, **{name: dataclasses.replace(getattr(recipe, name), **values) for name, values in sections.items()})
