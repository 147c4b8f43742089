"""Whole iterations of a recipe: the plain loop, the plain loop compiled, and the engine with one feature after another."""

import dataclasses
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from dfkd_fast import DfkdError, Recipe, Trainer
from dfkd_fast.engine.device import device_name, keep_freed_memory
from dfkd_fast.engine.optim import build_optimizer
from dfkd_fast.errors import first_line
from dfkd_fast.files import replacing
from dfkd_fast.kernels import use_backend
from dfkd_fast.models import CpuConv2d, build_generator, build_model

from . import provenance, table
from .baselines import plain
from .memory import PeakMemory, give_freed_memory_back

__all__ = ["Row", "draw", "measure", "networks", "write"]

WARM_UP = 2
Precision = Literal["fp32", "bf16", "fp16"]


Times = list[tuple[float, float]]
"""Of each turn, the seconds of the student's steps and of all."""
Result = TypeVar("Result")


class Contender(NamedTuple):
    """Someone who can be timed."""

    run: Callable[[], tuple[float, float]]
    """One whole iteration; returns the seconds of the student's steps and of all."""
    student_optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class Row:
    """One contender."""

    recipe: str
    batch_size: int
    precision: str
    contender: str
    seconds_per_iteration: float
    """Median over the turns: all the student's and the generator's steps."""
    student_seconds: float
    generator_seconds: float
    iterations_per_second: float
    images_per_second: float
    """Generated for the student and for the generator."""
    speedup_over_plain: float | None
    """The median of the turns' ratios; None while the other has none, or where it failed."""
    speedup_over_plain_compiled: float | None
    peak_memory_mib: float | None
    """Of an iteration, beyond what is held between iterations; on a CPU not of what must be compiled, which needs more than it runs in."""
    imitation_memory_mib: float | None
    """The same of its student steps only; None where they are replayed as a CUDA graph."""
    turns: int
    device: str
    load: float
    torch: str
    commit: str
    command: str


def measure(
    recipe: Recipe,
    device: torch.device,
    precision: Precision,
    turns: int,
    command: str,
    *,
    compiled_engine: bool = False,
    failed: Callable[[str], None] = lambda line: None,
) -> Iterator[list[Row]]:
    """Time all contenders, with untrained networks; yields the rows so far whenever there are more figures.

    On a CPU they take turns, and the memory of those not compiled is measured afterwards. On a GPU one comes after the other, alone
    on the device. Each has a process of its own: malloc is told what to do for all of one, and memory that is kept on a GPU, too.

    Args:
        failed: told in a line of a contender that failed on a GPU; the others go on.

    Raises:
        DfkdError: the plain loop does not know the recipe's method.
    """
    _check(recipe)
    case = {
        "recipe": recipe.name,
        "batch_size": recipe.loop.batch_size,
        "precision": precision,
        "turns": turns,
        "device": device_name(device),
        "load": round(os.getloadavg()[0], 2),
        "torch": str(torch.__version__),
        "commit": provenance.commit(),
        "command": command,
    }
    times: dict[str, Times] = {}
    memory: dict[str, tuple[float, float | None]] = {}
    names, arguments = list(_contenders(recipe, device, precision, compiled_engine)), (recipe, device, precision, compiled_engine)
    if device.type == "cuda":
        for name in names:
            try:
                times[name], memory[name] = _in_its_own_process(_times_and_memory, *arguments, name, turns)
            except Exception as error:
                failed(f"{name}: {first_line(error)}")
            else:
                yield _rows(recipe, case, times, memory)
        return
    times = _times_in_turns({name: partial(_turn, *arguments, name) for name in names}, turns)
    yield _rows(recipe, case, times, memory)
    for name in names:
        if "compiled" not in name:
            memory[name] = _in_its_own_process(_memory_alone, *arguments, name)
            yield _rows(recipe, case, times, memory)


def _rows(recipe: Recipe, case: dict[str, Any], times: dict[str, Times], memory: dict[str, tuple[float, float | None]]) -> list[Row]:
    replayed = recipe.replay.rows_of(recipe.loop.batch_size) if recipe.replay.replays else 0
    images = recipe.loop.student_steps * (recipe.loop.batch_size + replayed) + recipe.loop.generator_steps * recipe.loop.batch_size

    def ratio(name: str, other: str) -> float | None:
        if other not in times:
            return None
        return round(statistics.median(theirs[1] / ours[1] for ours, theirs in zip(times[name], times[other], strict=True)), 3)

    rows = []
    for name, measured in times.items():
        student, seconds = (statistics.median(column) for column in zip(*measured, strict=True))
        peak, imitation = memory.get(name, (None, None))
        rows.append(
            Row(
                contender=name,
                seconds_per_iteration=round(seconds, 6),
                student_seconds=round(student, 6),
                generator_seconds=round(seconds - student, 6),
                iterations_per_second=round(1 / seconds, 4),
                images_per_second=round(images / seconds, 2),
                speedup_over_plain=ratio(name, "plain"),
                speedup_over_plain_compiled=ratio(name, "plain_compiled"),
                peak_memory_mib=peak,
                imitation_memory_mib=imitation,
                **case,
            )
        )
    return rows


def _times_in_turns(contenders: dict[str, Callable[[], tuple[float, float]]], turns: int) -> dict[str, Times]:
    with ExitStack() as stack:
        processes = {name: stack.enter_context(_process()) for name in contenders}
        times: dict[str, Times] = {name: [] for name in contenders}
        for turn in range(WARM_UP + turns):
            for name, run in contenders.items():
                seconds = processes[name].submit(run).result()
                if turn >= WARM_UP:
                    times[name].append(seconds)
    return times


def _in_its_own_process(function: Callable[..., Result], *arguments: object) -> Result:
    with _process() as process:
        return process.submit(function, *arguments).result()


def _process() -> ProcessPoolExecutor:
    # Not a Pool: it would wait for ever for a process that the system killed.
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (torch.get_num_threads(),))


_playing: list[Contender] = []


def _turn(recipe: Recipe, device: torch.device, precision: Precision, compiled_engine: bool, name: str) -> tuple[float, float]:
    """An iteration of the one contender of this process."""
    if not _playing:
        _playing.append(_contenders(recipe, device, precision, compiled_engine)[name]())
    return _playing[0].run()


def _times_and_memory(
    recipe: Recipe, device: torch.device, precision: Precision, compiled_engine: bool, name: str, turns: int
) -> tuple[Times, tuple[float, float | None]]:
    contender = _contenders(recipe, device, precision, compiled_engine)[name]()
    times = [contender.run() for _ in range(WARM_UP + turns)]
    return times[WARM_UP:], _memory(contender, device)


def _memory_alone(
    recipe: Recipe, device: torch.device, precision: Precision, compiled_engine: bool, name: str
) -> tuple[float, float | None]:
    give_freed_memory_back()
    contender = _contenders(recipe, device, precision, compiled_engine, keep_memory=False)[name]()
    for _ in range(WARM_UP):
        contender.run()
    return _memory(contender, device)


def _memory(contender: Contender, device: torch.device) -> tuple[float, float | None]:
    """Of an iteration, beyond what is held between iterations, and of its student steps, which come first."""
    peak = PeakMemory(device)
    imitation: list[float] = []
    contender.student_optimizer.register_step_post_hook(lambda *_: imitation.append(peak.mib()))
    contender.run()
    # A replayed graph calls no hook, and the student's shares its memory with the generator's: what is its own cannot be told.
    return peak.mib(), imitation[-1] if imitation else None


def _check(recipe: Recipe) -> None:
    objective = recipe.objective
    known = objective.discrepancy == objective.adversary and objective.discrepancy in ("l1", "kl") and objective.temperature == 1.0
    others = (objective.one_hot, objective.entropy, objective.activation, objective.class_nll, objective.embedding_norm)
    known &= not any(others) and objective.adversarial == 1.0
    known &= recipe.replay.kind in ("none", "ema_generator") and recipe.replay.rows == 0 and recipe.update.kind == "plain"
    known &= recipe.loop.generator_steps == 1 and not recipe.loop.generator_first
    if not known:
        raise DfkdError(f"--recipe {recipe.name!r}: the plain loop knows L1 or KL, with or without BN moments and an averaged generator")


def _contenders(
    recipe: Recipe, device: torch.device, precision: Precision, compiled_engine: bool = False, *, keep_memory: bool = True
) -> dict[str, Callable[[], Contender]]:
    contenders: dict[str, Callable[[], Contender]] = {
        "plain": lambda: _plain(recipe, device, "fp32", compiled=False),
        "plain_compiled": lambda: _plain(recipe, device, precision, compiled=True),
    }
    if device.type == "cpu":
        contenders["plain, memory kept"] = lambda: _plain(recipe, device, "fp32", compiled=False, keep_memory=keep_memory)
    # What each switches on beside all that stand above it.
    features: list[tuple[str, dict[str, Any]]] = [
        ("no wasted work", dict.fromkeys(("loop.channels_last", "loop.fold_teacher", "loop.capture"), False) | {"loop.precision": "fp32"}),
        ("channels-last", {"loop.channels_last": True}),
        ("transposed convolution", {"textbook": False}),
        ("fused kernels", {"kernels": True}),
        ("folded teacher", {"loop.fold_teacher": True}),
    ]
    if device.type == "cpu":
        features[2:2] = [("chosen algorithms", {"algorithms": True}), ("kept memory", {"loop.keep_memory": keep_memory})]
    if precision != "fp32":
        features.append(("precision", {"loop.precision": precision}))
    if device.type == "cuda":
        features.append(("CUDA graphs", {"loop.capture": True}))
    changes: dict[str, Any] = {"textbook": True, "kernels": False, "algorithms": False, "loop.keep_memory": False}
    for name, switched in features:
        changes = changes | switched
        contenders[f"+ {name}"] = partial(_engine, recipe, device, changes)
    contenders["engine"] = contenders.pop(next(reversed(contenders)))
    if compiled_engine:
        contenders["engine, compiled"] = partial(_engine, recipe, device, changes | {"loop.compile": True})
    return contenders


def networks(recipe: Recipe) -> tuple[Any, Any, Any]:
    """The recipe's teacher, student and generator, untrained, always the same."""
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
    endless = {"loop.epochs": 1, "loop.iterations_per_epoch": 100_000, "loop.generator_pretraining": 0}
    trainer = Trainer(teacher, student, generator, _changed(recipe, changes | endless), device=device)
    if not changes["algorithms"]:
        for network in (trainer._game.teacher, trainer._game.observer.network, student, generator):
            _convolve(network)

    def run() -> tuple[float, float]:
        with nullcontext() if kernels else use_backend("reference"):
            begin, student = time.perf_counter(), trainer.clock.read().get("student", 0.0)
            trainer._iterate()
            phases = trainer.clock.read()
        return phases["student"] - student, time.perf_counter() - begin

    return Contender(run, trainer.student_optimizer)


def _convolve(network: nn.Module) -> None:
    for layer in network.modules():
        if type(layer) is CpuConv2d:
            layer.__class__ = nn.Conv2d  # type: ignore[assignment]


def _plain(recipe: Recipe, device: torch.device, precision: Precision, *, compiled: bool, keep_memory: bool = False) -> Contender:
    if keep_memory:
        keep_freed_memory()
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
        iterations_per_epoch=100_000,
        batch_size=recipe.loop.batch_size,
        latent_dim=recipe.generator.latent_dim,
        student_steps=recipe.loop.student_steps,
        ema_decay=recipe.replay.ema_decay if recipe.replay.replays else None,
        fresh_weight=recipe.replay.fresh_weight,
        replay_weight=recipe.replay.weight,
        discrepancy=recipe.objective.discrepancy,  # type: ignore[arg-type]  # checked
        bn_moments=recipe.objective.bn_moments,
        student_in_generator_step=recipe.loop.student_in_generator_step,
        device=device,
    )
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    if compiled and precision != "fp32":
        autocast = lambda: torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])  # noqa: E731

    def run() -> tuple[float, float]:
        begin = time.perf_counter()
        with autocast():
            done = next(iterations)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return done.student_seconds, time.perf_counter() - begin

    return Contender(run, student_optimizer)


def _changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    sections: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        section, dot, key = path.partition(".")
        if dot:
            sections.setdefault(section, {})[key] = value
    return dataclasses.replace(recipe, **{name: dataclasses.replace(getattr(recipe, name), **values) for name, values in sections.items()})


def write(path: Path, rows: Sequence[Row]) -> None:
    """Take rows into a file: they replace those of the same recipe, batch, precision and device."""
    kept = [row for row in (table.read(path) if path.exists() else []) if _case(row) != _case(dataclasses.asdict(rows[0]))]
    table.write(path, table.names(Row), [*kept, *map(dataclasses.asdict, rows)])


def _case(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("recipe", "batch_size", "precision", "device"))


def draw(rows: Sequence[dict[str, str]], path: Path) -> None:
    """A stacked bar a contender and case: the student's and the generator's seconds of an iteration."""
    cases = list(dict.fromkeys(_case(row) for row in rows))
    figure = Figure(figsize=(9, 1 + 0.3 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(cases), 1, squeeze=False)[:, 0]
    for axes, case in zip(panels, cases, strict=True):
        bars = [row for row in rows if _case(row) == case][::-1]
        names = [row["contender"] for row in bars]
        student, generator = ([float(row[f"{player}_seconds"]) for row in bars] for player in ("student", "generator"))
        axes.barh(names, student, label="student's steps")
        axes.barh(names, generator, left=student, label="generator's step")
        for row, total in zip(bars, map(sum, zip(student, generator, strict=True)), strict=True):
            if row["speedup_over_plain"]:
                axes.text(total, row["contender"], f" {float(row['speedup_over_plain']):.1f} ×", va="center", fontsize=8)
        axes.set(title=f"{case[0]}, batch {case[1]}, {case[2]}, {case[3]}", xlabel="seconds an iteration")
        axes.set_xlim(0, 1.15 * max(map(sum, zip(student, generator, strict=True))))
        axes.grid(axis="x", alpha=0.3)
    panels[0].legend(loc="lower right")
    with replacing(path) as part:
        figure.savefig(part, dpi=120)
