"""The contenders: the plain loop as four peers on a CPU (eager or compiled, with or without malloc reuse), and the engine's features."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from typing_extensions import override

from dfkd_fast import DfkdError, Recipe, Trainer
from dfkd_fast.choices import PrecisionName, Region
from dfkd_fast.engine.clock import Clock
from dfkd_fast.engine.device import reuse_freed_memory
from dfkd_fast.engine.optim import build_optimizer
from dfkd_fast.kernels import use_backend
from dfkd_fast.methods import EmaGeneratorSettings
from dfkd_fast.models import build_generator, build_model

from ..baselines import plain

__all__ = ["PEERS", "Contender", "Times", "build", "check", "contenders", "current_name", "is_engine", "networks"]

Times = list[tuple[float, float]]
"""For each iteration, the seconds of the student's steps and of all steps."""
PEERS = ("plain", "plain + malloc reuse", "plain compiled", "plain compiled + malloc reuse")
"""The contenders that the engine is compared with; on a GPU those without malloc reuse only."""
RENAMED = {
    "plain_compiled": "plain compiled",
    "plain, memory kept": "plain + malloc reuse",
    "+ no wasted work": "+ no redundant gradients",
    "+ chosen algorithms": "+ CPU convolution selection",
    "+ kept memory": "+ malloc reuse",
}
"""Names of contenders in results of earlier versions."""
MAX_ITERATIONS = 100_000
"""Length of a contender's only epoch; more iterations than any benchmark times."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def current_name(contender: str) -> str:
    """Return the current name of a contender that an earlier version may have named differently."""
    return RENAMED.get(contender, contender)


def is_engine(contender: str) -> bool:
    """Return whether a contender is the engine with every feature of the ladder."""
    return contender.partition(" (")[0] == "engine"


@dataclass(frozen=True)
class Contender:
    """One implementation of a recipe's training loop."""

    run: Callable[[int], Times]
    """Runs the given number of iterations back to back; synchronizes with the device only where the contender itself does."""
    student_optimizer: torch.optim.Optimizer
    autocast: PrecisionName = "fp32"
    """Compute precision of the networks."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """Settings that the engine could not apply as requested."""
    captured: bool = False
    """Whether the steps should be replayed as CUDA graphs."""
    capture_succeeded: Callable[[], bool] = lambda: True
    """Returns False if the steps should be captured and could not be."""


class Timestamps:
    """Timestamps in a device's work queue. On a GPU they are CUDA events, so that recording one does not synchronize.

    Args:
        device: device whose work is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._recorded: list[Any] = []

    def record(self) -> None:
        """Record a timestamp after the work submitted so far."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._recorded.append(event)
        else:
            self._recorded.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the seconds between consecutive timestamps and clear them. Synchronizes with the device."""
        recorded, self._recorded = self._recorded, []
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return [begin.elapsed_time(end) / 1000 for begin, end in itertools.pairwise(recorded)]
        return [end - begin for begin, end in itertools.pairwise(recorded)]


class _TimestampingClock(Clock):
    """A trainer's clock that also records a timestamp at the end of the student's and of the generator's steps."""

    def __init__(self, device: torch.device, timestamps: Timestamps) -> None:
        super().__init__(device)
        self._timestamps = timestamps

    @override
    @contextmanager
    def phase(self, name: str, *, memory: bool = True) -> Iterator[None]:
        with super().phase(name, memory=memory):
            yield
        if name != "compilation":
            self._timestamps.record()


def check(recipe: Recipe) -> None:
    """Check that the plain loop implements a recipe's method.

    Raises:
        DfkdError: The plain loop does not implement it.
    """
    objective = recipe.objective
    known = objective.discrepancy == objective.adversary and objective.discrepancy in ("l1", "kl") and objective.temperature == 1.0
    others = (objective.one_hot, objective.entropy, objective.activation, objective.class_nll, objective.embedding_norm)
    known &= not any(others) and objective.adversarial == 1.0
    known &= recipe.replay.kind in ("none", "ema_generator") and recipe.replay.rows == 0 and recipe.update.kind == "plain"
    known &= recipe.loop.generator_steps == 1 and not recipe.loop.generator_first
    if not known:
        raise DfkdError(f"--recipe {recipe.name!r}: the plain loop implements L1 or KL, with or without BN moments and an EMA generator")


def contenders(
    recipe: Recipe,
    device: torch.device,
    precision: PrecisionName,
    *,
    compiled_engine: bool = False,
    malloc_reuse: bool = True,
    graphs: bool | None = None,
) -> dict[str, Callable[[], Contender]]:
    """Return a builder for each contender, by name: the plain loop's :data:`PEERS`, then a ladder of the engine's features.

    Each rung of the ladder enables the feature in its name and keeps those of the rungs before. The last rung is the engine, and its name
    has the feature in brackets, as ``engine (+ bf16 autocast)``.

    Args:
        recipe: recipe to run, with untrained networks.
        device: device to run on.
        precision: precision of the engine and of the compiled plain loop.
        compiled_engine: also return the engine with each of its regions compiled, as ``engine, compiled teacher``, and with all, as
            ``+ torch.compile``.
        malloc_reuse: if False, the contenders with malloc reuse run without it. Peak memory is measured like this on a CPU.
        graphs: whether CUDA graphs are the last feature; by default on a GPU only. On a CPU they have no effect.
    """
    on_cpu = device.type == "cpu"
    builders: dict[str, Callable[[], Contender]] = {}
    for name in PEERS:
        reused = name.endswith("malloc reuse")
        if on_cpu or not reused:
            compiled = name.startswith("plain compiled")
            builders[name] = partial(
                _plain, recipe, device, precision if compiled else "fp32", compiled=compiled, malloc_reuse=reused and malloc_reuse
            )
    switches = ("channels_last", "cpu_convolutions", "malloc_reuse", "fold_teacher", "fuse_teacher", "capture")
    textbook = {"textbook": True, "kernels": False, "engine.precision": "fp32"} | {f"engine.{name}": False for name in switches}
    features: list[tuple[str, dict[str, Any]]] = [
        ("+ no redundant gradients", textbook),
        ("+ channels-last", {"engine.channels_last": True}),
    ]
    if on_cpu:
        features.append(("+ CPU convolution selection", {"engine.cpu_convolutions": True}))
        features.append(("+ malloc reuse", {"engine.malloc_reuse": malloc_reuse}))
    features.append(("+ transposed convolution", {"textbook": False}))
    features.append(("+ fused kernels", {"kernels": True}))
    features.append(("+ folded teacher", {"engine.fold_teacher": True}))
    if not on_cpu:
        features.append(("+ fused teacher", {"engine.fuse_teacher": True}))
    if precision != "fp32":
        features.append((f"+ {precision} autocast", {"engine.precision": precision}))
    if graphs or (graphs is None and not on_cpu):
        features.append(("+ CUDA graphs", {"engine.capture": True}))
    features[-1] = (f"engine ({features[-1][0]})", features[-1][1])
    changes: dict[str, Any] = {"engine.compile": False}
    for name, enabled in features:
        changes = changes | enabled
        builders[name] = partial(_engine, recipe, device, changes)
    if compiled_engine:
        for region in get_args(Region):
            builders[f"engine, compiled {region}"] = partial(_engine, recipe, device, changes | {"engine.compile": (region,)})
        builders["+ torch.compile"] = partial(_engine, recipe, device, changes | {"engine.compile": True})
    return builders


def build(recipe: Recipe, device: torch.device, precision: PrecisionName, name: str, **options: Any) -> Contender:
    """Build the contender with the given name; for the options see :func:`contenders`."""
    return contenders(recipe, device, precision, **options)[name]()


def networks(recipe: Recipe) -> tuple[Any, Any, Any]:
    """Return the recipe's teacher, student and generator, untrained and initialized from seed 0."""
    torch.manual_seed(0)
    data = recipe.data
    teacher, student = (build_model(name, data.num_classes, data.channels) for name in (recipe.teacher.model, recipe.student.model))
    generator = build_generator(
        recipe.generator, data.channels, recipe.generated_size, mean=data.mean, std=data.std, num_classes=data.num_classes
    )
    return teacher, student, generator


def _engine(recipe: Recipe, device: torch.device, changes: dict[str, Any]) -> Contender:
    teacher, student, generator = networks(recipe)
    if changes["textbook"]:
        plain.textbook(generator)
    kernels: bool = changes["kernels"]
    one_epoch = {"loop.epochs": 1, "loop.iterations_per_epoch": MAX_ITERATIONS, "loop.generator_pretraining": 0}
    trainer = Trainer(teacher, student, generator, _changed(recipe, changes | one_epoch), device=device)
    timestamps = Timestamps(device)
    trainer.state.clock = _TimestampingClock(device, timestamps)
    captured = device.type == "cuda" and trainer.method.engine.capture

    def run(iterations: int) -> Times:
        with nullcontext() if kernels else use_backend("reference"):
            timestamps.record()
            for _ in range(iterations):
                trainer.iterate()
        phases = timestamps.seconds()
        trainer.state.clock.read()  # clears its own events
        return [(student, student + generator) for student, generator in zip(phases[::2], phases[1::2], strict=True)]

    return Contender(
        run,
        trainer.state.student_optimizer,
        trainer.state.precision.name,
        trainer.notes,
        captured,
        capture_succeeded=lambda: trainer.steps.capturing == captured,
    )


def _plain(recipe: Recipe, device: torch.device, precision: PrecisionName, *, compiled: bool, malloc_reuse: bool = False) -> Contender:
    if malloc_reuse:
        reuse_freed_memory()
    teacher, student, generator = (network.to(device) for network in networks(recipe))
    plain.textbook(generator)
    teacher.requires_grad_(True)
    if compiled:
        # Not network.compile(): it does not compile a Sequential, nor the copy of the generator that MAD averages.
        teacher, student, generator = (
            torch.compile(network.to(memory_format=torch.channels_last), dynamic=False) for network in (teacher, student, generator)
        )
    # Built for a CPU on every device: PyTorch's default implementation, not the fused one.
    student_optimizer = build_optimizer(recipe.student_optimizer, student.parameters(), torch.device("cpu"))
    generator_optimizer = build_optimizer(recipe.generator_optimizer, generator.parameters(), torch.device("cpu"))
    iterations: Iterator[plain.Iteration] = plain.distill(
        teacher,
        student,
        generator,
        student_optimizer=student_optimizer,
        generator_optimizer=generator_optimizer,
        epochs=1,
        iterations_per_epoch=MAX_ITERATIONS,
        batch_size=recipe.loop.batch_size,
        latent_dim=recipe.generator.latent_dim,
        student_steps=recipe.loop.student_steps,
        ema_decay=recipe.replay.table(EmaGeneratorSettings).decay if recipe.replay.replays else None,
        student_weight=recipe.objective.student_weight,
        share=recipe.replay.share,
        discrepancy=recipe.objective.discrepancy,  # type: ignore[arg-type]  # checked
        bn_moments=recipe.objective.bn_moments,
        student_in_generator_step=recipe.loop.student_in_generator_step,
        device=device,
    )
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    if precision != "fp32":
        # Around a whole iteration: cached casts of weights would miss the optimizers' steps.
        autocast = partial(torch.autocast, device.type, DTYPES[precision], cache_enabled=False)
    timestamps = Timestamps(device)

    def run(count: int) -> Times:
        student_seconds = []
        timestamps.record()
        for _ in range(count):
            with autocast():
                # Host time, which includes the device's because the loop reads back the loss of each step.
                student_seconds.append(next(iterations).student_seconds)
            timestamps.record()
        return list(zip(student_seconds, timestamps.seconds(), strict=True))

    return Contender(run, student_optimizer, precision)


def _changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    sections: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        section, dot, key = path.partition(".")
        if dot:
            sections.setdefault(section, {})[key] = value
    return dataclasses.replace(recipe, **{name: dataclasses.replace(getattr(recipe, name), **values) for name, values in sections.items()})
