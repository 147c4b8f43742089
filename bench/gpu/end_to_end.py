"""Stage 5: time, memory and kernels of whole iterations of the recipes, in the plain loop and in the engine.

Before anything is timed, parallel processes compile the compiled loops and leave the code in the on-disk caches.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, get_args

import torch
import torch._inductor.config

from dfkd_fast import Recipe, load_recipe
from dfkd_fast.choices import Region
from dfkd_fast.engine.precision import resolve_precision

from .. import table
from ..end_to_end import measuring
from ..end_to_end.contenders import Contender, Times, build, check, contenders
from ..end_to_end.measuring import Profile
from ..end_to_end.rows import Row, row_of
from ..processes import OutOfTime, Pool, WorkerError, Workers
from ..provenance import measured_on
from . import rehearsal
from .context import Context

__all__ = ["Case", "Plan", "Priority", "compile_job", "prepare", "run"]

UNCONDITIONAL = {
    "name": "imagenet-mad, unconditional",
    "generator.conditional": False,
    "objective.class_nll": 0.0,
    "objective.embedding_norm": 0.0,
    "loop.generator_pretraining": 0,
}
"""imagenet-mad without the parts that the plain loop does not implement, a small part of the recipe's work."""
COMPILED = "plain compiled"
ENGINE = "engine (+ CUDA graphs)"
EAGER_ENGINE = ("+ bf16 autocast", "+ fp16 autocast")
"""The rung before CUDA graphs, which depends on the GPU's precision."""
COMPILED_ENGINE = (*(f"engine, compiled {region}" for region in get_args(Region)), "+ torch.compile")
COMPILE_SHARE = 0.4  # maximum fraction of the remaining time
MARGIN = 1.0  # seconds before the stage's deadline at which a contender is stopped, so that the failure is still recorded
OPTIONS: dict[str, Any] = {"graphs": True, "compiled_engine": True}
TITLES = {"plain": "plain", **dict.fromkeys(EAGER_ENGINE, "eager engine"), ENGINE: "engine with CUDA graphs", COMPILED: COMPILED}
"""The contenders in a recipe's summary line, and their titles there."""


class Priority(NamedTuple):
    """Contenders that are measured for all recipes before those of the next priority."""

    contenders: tuple[str, ...]
    """Their names, of which a recipe may lack some; empty for all contenders that no priority names."""
    limit: float
    """Time limit of a contender in seconds, counted from when its process is prepared."""
    needs: float
    """Minimum remaining time in seconds to start a contender."""


@dataclass(frozen=True)
class Plan:
    """Recipes and contenders to measure, and for how long."""

    recipes: tuple[tuple[str, Mapping[str, object]], ...]
    """Names and overrides."""
    priorities: tuple[Priority, ...]
    seconds: float
    """Target time of a contender's timed iterations."""
    minimum: int
    """Minimum number of timed iterations."""
    profiled: int
    """Number of profiled iterations."""


KERNELS = 25
PLAN = Plan(
    recipes=(("mnist-dfad", {}), ("cifar10-dfad", {}), ("cifar10-mad", {}), ("imagenet-mad", UNCONDITIONAL)),
    priorities=(
        Priority(("plain", ENGINE, COMPILED), limit=75, needs=10),
        Priority(EAGER_ENGINE, limit=45, needs=10),
        Priority((), limit=45, needs=10),
        Priority(COMPILED_ENGINE, limit=90, needs=30),
    ),
    seconds=2.0,
    minimum=5,
    profiled=2,
)
REHEARSAL = Plan(
    recipes=(("digits-mad", {"loop.batch_size": 8, "loop.student_steps": 2, "generator.width": 4}),),
    priorities=(Priority(("plain", ENGINE), limit=60, needs=1), Priority(("+ fused kernels",), limit=60, needs=1)),
    seconds=0.0,
    minimum=2,
    profiled=1,
)


@dataclass(frozen=True)
class Case:
    """One contender of a recipe."""

    recipe: Recipe
    contender: str
    build: Callable[[], Contender]
    """Called in another process, so it must be picklable."""
    priority: Priority

    @property
    def name(self) -> str:
        """Name of the case in its records."""
        return f"{self.recipe.name} / {self.contender}"


class Job(NamedTuple):
    """A contender to compile in another process."""

    name: str
    """Name of the case."""
    build: Callable[[], Contender]


@dataclass
class RecipeTimes:
    """Times of a recipe's contenders so far."""

    resumed: bool
    """Whether an earlier call measured some of them; those times are not available here."""
    times: dict[str, Times] = field(default_factory=dict)


def run(context: Context) -> None:
    """Record a row for each contender with time, memory and kernels of an iteration, and a row for each of its most expensive kernels.

    Each contender runs alone on the device, in its own process. A contender that fails, hangs or cannot be captured is a failed case and
    does not affect the others.
    """
    plan = REHEARSAL if context.rehearse else PLAN
    groups = _cases(plan, context.device)
    cases = [case for group in groups for case in group]
    recipe_times = {
        recipe: RecipeTimes(any(case.name in context.done for case in cases if case.recipe.name == recipe))
        for recipe in dict.fromkeys(case.recipe.name for case in cases)
    }
    remaining = sum(case.name not in context.done for case in cases)
    with Workers(remaining, partial(prepare, context.rehearse)) as workers:
        _compile(context, [case for case in cases if case.contender == COMPILED and case.name not in context.done])
        for group in groups:
            needs = max((case.priority.needs for case in group), default=0.0)
            for case in context.cases(group, lambda case: case.name, needs=needs):
                with context.attempt(case.name):
                    _measure(context, plan, case, workers, recipe_times[case.recipe.name])


def prepare(rehearse: bool) -> None:
    """Called first in every worker process: imports this module and everything that measures."""
    if rehearse:
        rehearsal.prepare()
    # Equal in all processes, because the caches' keys depend on it.
    torch._inductor.config.compile_threads = max(1, (os.cpu_count() or 1) // len(PLAN.recipes))
    # Autotuning is unreliable while several processes share a GPU: it is repeated where the contender is timed.
    torch._inductor.config.autotune_local_cache = False


def compile_job(rehearse: bool, job: Job) -> float:
    """Compile a contender into the on-disk caches; returns the seconds it took."""
    begin = time.monotonic()
    prepare(rehearse)
    job.build().run(1)
    return time.monotonic() - begin


def _compile(context: Context, cases: list[Case]) -> None:
    """Compile all cases in parallel. A case that does not compile here is compiled, or fails, where it is measured."""
    if not cases:
        return
    begin = time.monotonic()
    jobs = [Job(case.name, case.build) for case in cases]
    with Pool(partial(compile_job, context.rehearse), len(jobs)) as pool:
        results = dict(pool.results(jobs, begin + COMPILE_SHARE * context.seconds_left()))
    taken = round(time.monotonic() - begin, 2)
    times = {job.name: round(result, 2) for job, result in results.items() if not isinstance(result, WorkerError)}
    text = f"compiled {len(times)} of {len(jobs)} contenders in {taken:.0f} s"
    context.record("compiling", text=text, seconds=taken, table="compilation", row=times)


def _cases(plan: Plan, device: torch.device) -> list[list[Case]]:
    """Return the cases by priority, most important first."""
    precision = resolve_precision("auto", device)
    recipes = [load_recipe(name, changes) for name, changes in plan.recipes]
    for recipe in recipes:
        check(recipe)
    named = {name for priority in plan.priorities for name in priority.contenders}
    existing = {recipe.name: list(contenders(recipe, device, precision, **OPTIONS)) for recipe in recipes}
    return [
        [
            Case(recipe, name, partial(build, recipe, device, precision, name, **OPTIONS), priority)
            for recipe in recipes
            for name in priority.contenders or [name for name in existing[recipe.name] if name not in named]
            if name in existing[recipe.name]
        ]
        for priority in plan.priorities
    ]


def _measure(context: Context, plan: Plan, case: Case, workers: Workers, measured: RecipeTimes) -> None:
    """Record a contender's times, then its memory, then its kernels; if a part fails, the earlier ones are recorded already."""
    begin, end = time.monotonic(), context.deadline - MARGIN
    part = case.name

    def seconds_left() -> float:
        return max(end - time.monotonic(), 0.1)

    try:
        worker = workers.take(seconds_left())
        begin = time.monotonic()
        end = min(begin + case.priority.limit, end)
        start = worker.call(measuring.begin, case.build, context.device, limit=seconds_left())
        measured.times[case.contender] = worker.call(measuring.time_for, plan.seconds, plan.minimum, limit=seconds_left())
        row_with = partial(
            row_of,
            case.recipe,
            case.contender,
            measured.times,
            interleaved=False,
            precision=resolve_precision("auto", context.device),
            provenance=measured_on(*(context.origin[name] for name in ("device", "command", "commit"))),
            **start._asdict(),
        )
        _record(context, case, row_with(memory=None), begin)
        if case.contender in TITLES:
            _record_line(context, case.recipe, measured)
        part = f"{case.name}: memory"
        row = row_with(memory=worker.call(measuring.memory, context.device, limit=seconds_left()))
        _record(context, case, row, begin)
        part = f"{case.name}: kernels"
        profile = worker.call(measuring.kernels, context.device, plan.profiled, KERNELS, limit=seconds_left())
        steps = case.recipe.loop.student_steps + case.recipe.loop.generator_steps
        row = replace(
            row,
            kernels_per_iteration=round(profile.calls_per_iteration, 2),
            kernels_per_step=round(profile.calls_per_iteration / steps, 2),
            kernel_seconds=round(profile.seconds_per_iteration, 6),
        )
        _record(context, case, row, begin)
        _record_kernels(context, case, profile)
    except WorkerError as error:
        if isinstance(error, OutOfTime) and context.seconds_left() <= MARGIN:
            context.leave(part)
        else:
            context.record(part, "failed", str(error), detail=error.detail, seconds=round(time.monotonic() - begin, 2))


def _record(context: Context, case: Case, row: Row, begin: float) -> None:
    """Record a contender's results so far; a later record replaces this one."""
    quartiles = (row.lower_quartile_seconds, row.upper_quartile_seconds)
    parts = [
        f"{_ms(row.seconds_per_iteration)} ms/iteration ({' to '.join(map(_ms, filter(None, quartiles)))}; {row.turns} iterations)",
        f"student {_ms(row.student_seconds)}",
        row.autocast,
        f"TF32 {row.tf32}" if row.tf32 == "nowhere" else f"TF32 in {row.tf32}" if row.tf32 else "",
        f"{row.reserved_mib:.0f} MiB" if row.reserved_mib is not None else "",
        f"{row.kernels_per_iteration:.0f} kernels" if row.kernels_per_iteration is not None else "",
        row.notes,
    ]
    seconds = round(time.monotonic() - begin, 2)
    context.record(case.name, text=", ".join(filter(None, parts)), seconds=seconds, table="end-to-end", row=table.cells(row))


def _record_line(context: Context, recipe: Recipe, measured: RecipeTimes) -> None:
    """Record one line with all times of a recipe; those that an earlier call measured have their own line."""
    medians = {name: statistics.median(seconds for _, seconds in times) for name, times in measured.times.items()}
    parts = []
    for name, title in TITLES.items():
        if name in medians:
            peers = ("plain",) if name == COMPILED else ("plain", COMPILED)
            ratios = [f"{medians[peer] / medians[name]:.2f} × {TITLES[peer]}" for peer in peers if peer in medians and name != peer]
            compared = f" ({', '.join(ratios)})" if ratios else ""
            parts.append(f"{title} {_ms(medians[name])} ms{compared}")
    case = f"{recipe.name}, resumed" if measured.resumed else recipe.name
    context.record(case, text=f"{recipe.name} {recipe.loop.batch_size}: {', '.join(parts)}", highlight=True, table="comparison")


def _record_kernels(context: Context, case: Case, profile: Profile) -> None:
    for rank, kernel in enumerate(profile.most_expensive, 1):
        row = {"recipe": case.recipe.name, "batch_size": case.recipe.loop.batch_size, "contender": case.contender, "rank": rank}
        text = (
            f"{kernel.us_per_iteration:.1f} µs/iteration, {100 * kernel.share:.1f} %, {kernel.calls_per_iteration:g} calls: {kernel.name}"
        )
        context.record(f"{case.name}: kernel {rank}", text=text[:200], table="kernels", row=row | asdict(kernel))


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:.0f}"
