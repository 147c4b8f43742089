"""Whole iterations of a recipe: the plain loop, the plain loop compiled, and the engine with one feature after another."""

import ctypes
import dataclasses
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from dfkd_fast import DfkdError, Recipe, Trainer
from dfkd_fast.engine.device import device_name, keep_freed_memory
from dfkd_fast.engine.optim import build_optimizer
from dfkd_fast.files import replacing
from dfkd_fast.kernels import use_backend
from dfkd_fast.models import CpuConv2d, build_generator, build_model

from . import provenance, table
from .baselines import plain

__all__ = ["Row", "draw", "measure", "networks", "write"]

WARM_UP = 2
M_MMAP_THRESHOLD = -3  # of malloc.h
Precision = Literal["fp32", "bf16", "fp16"]


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
    speedup_over_plain: float
    """The median of the turns' ratios."""
    speedup_over_plain_compiled: float
    peak_memory_mib: float | None
    """Of an iteration, beyond what is held between iterations; in a process of its own, so not of what must be compiled."""
    imitation_memory_mib: float | None
    """The same of its student steps only."""
    turns: int
    device: str
    load: float
    torch: str
    commit: str
    command: str


def measure(
    recipe: Recipe, device: torch.device, precision: Precision, turns: int, command: str, *, compiled_engine: bool = False
) -> list[Row]:
    """Time all contenders in turns, with untrained networks; the memory of those not compiled in processes of their own.

    Raises:
        DfkdError: the plain loop does not know the recipe's method.
    """
    _check(recipe)
    with ExitStack() as stack:
        runs = _runs(stack, recipe, device, precision, compiled_engine)
        for run in runs.values():
            for _ in range(WARM_UP):
                run()
        load = os.getloadavg()[0]
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for _ in range(turns):
            for name, run in runs.items():
                times[name].append(run())
    replayed = recipe.replay.rows_of(recipe.loop.batch_size) if recipe.replay.replays else 0
    images = recipe.loop.student_steps * (recipe.loop.batch_size + replayed) + recipe.loop.generator_steps * recipe.loop.batch_size

    def ratio(name: str, other: str) -> float:
        return statistics.median(theirs[1] / ours[1] for ours, theirs in zip(times[name], times[other], strict=True))

    rows = []
    for name, measured in times.items():
        seconds = statistics.median(all_ for _, all_ in measured)
        student = statistics.median(student for student, _ in measured)
        memory = (None, None) if "compiled" in name else _in_its_own_process(recipe, device, precision, name)
        rows.append(
            Row(
                recipe=recipe.name,
                batch_size=recipe.loop.batch_size,
                precision=precision,
                contender=name,
                seconds_per_iteration=round(seconds, 6),
                student_seconds=round(student, 6),
                generator_seconds=round(seconds - student, 6),
                iterations_per_second=round(1 / seconds, 4),
                images_per_second=round(images / seconds, 2),
                speedup_over_plain=round(ratio(name, "plain"), 3),
                speedup_over_plain_compiled=round(ratio(name, "plain_compiled"), 3),
                peak_memory_mib=memory[0],
                imitation_memory_mib=memory[1],
                turns=turns,
                device=device_name(device),
                load=round(load, 2),
                torch=str(torch.__version__),
                commit=provenance.commit(),
                command=command,
            )
        )
    return rows


def _runs(
    stack: ExitStack, recipe: Recipe, device: torch.device, precision: Precision, compiled_engine: bool
) -> dict[str, Callable[[], tuple[float, float]]]:
    """What runs an iteration of each contender. On a CPU each has a process of its own: malloc is told what to do for all of one."""
    contenders = _contenders(recipe, device, precision, compiled_engine)
    if device.type == "cuda":
        return {name: build().run for name, build in contenders.items()}
    context, threads = multiprocessing.get_context("spawn"), torch.get_num_threads()
    pools = {name: context.Pool(1) for name in contenders}
    for pool in pools.values():
        stack.callback(pool.join)
        stack.callback(pool.close)
    return {name: partial(pool.apply, _turn, (recipe, device, precision, compiled_engine, name, threads)) for name, pool in pools.items()}


_playing: list[Contender] = []


def _turn(
    recipe: Recipe, device: torch.device, precision: Precision, compiled_engine: bool, name: str, threads: int
) -> tuple[float, float]:
    """An iteration of the one contender of this process."""
    if not _playing:
        torch.set_num_threads(threads)
        _playing.append(_contenders(recipe, device, precision, compiled_engine)[name]())
    return _playing[0].run()


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
        for network in (teacher, student, generator):
            network.to(memory_format=torch.channels_last).compile()
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


def _in_its_own_process(recipe: Recipe, device: torch.device, precision: Precision, name: str) -> tuple[float, float]:
    arguments = (recipe, device, precision, name, torch.get_num_threads())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory_mib, arguments)


def _peak_memory_mib(recipe: Recipe, device: torch.device, precision: Precision, name: str, threads: int) -> tuple[float, float]:
    """Of an iteration after the first ones, beyond what is held between iterations, and of its student steps, which come first."""
    torch.set_num_threads(threads)
    if device.type == "cpu":
        # Give large blocks back to the system when they are freed, so that what is resident is what is used.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    run, student_optimizer = _contenders(recipe, device, precision, keep_memory=False)[name]()
    for _ in range(WARM_UP):
        run()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets the process's peak to what it holds
        held = _resident("VmRSS")

    def peak(*_: object) -> float:
        bytes_ = torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident("VmHWM")
        return round((bytes_ - held) / 2**20, 1)

    imitation: list[float] = []
    student_optimizer.register_step_post_hook(lambda *_: imitation.append(peak()))
    run()
    return peak(), imitation[-1]


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


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
            axes.text(total, row["contender"], f" {float(row['speedup_over_plain']):.1f} ×", va="center", fontsize=8)
        axes.set(title=f"{case[0]}, batch {case[1]}, {case[2]}, {case[3]}", xlabel="seconds an iteration")
        axes.set_xlim(0, 1.15 * max(map(sum, zip(student, generator, strict=True))))
        axes.grid(axis="x", alpha=0.3)
    panels[0].legend(loc="lower right")
    with replacing(path) as part:
        figure.savefig(part, dpi=120)
