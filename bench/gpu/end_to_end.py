"""Stage 5: whole iterations of the recipes, by the plain loop and by the engine: their times, their memory and their kernels.

First, while nothing is timed, processes compile the compiled loops in parallel, and leave the code in the caches on disk.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
import torch._inductor.config

from dfkd_fast import Recipe, load_recipe
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
"""Without what the plain loop does not have, which is a small part of the recipe's work."""
COMPILED = "plain_compiled"
COMPILE_SHARE = 0.4  # at most, of the time that is left
MARGIN = 1.0  # seconds before the stage's deadline at which a contender is stopped, so that this is still recorded
TITLES = {"plain": "plain", "engine, eager": "engine eager", "engine": "captured", COMPILED: "plain compiled"}
"""The contenders that the line of a recipe names, and what it calls them."""


class Priority(NamedTuple):
    """Contenders of all recipes that are measured before those of the next priority."""

    contenders: tuple[str, ...]
    """Their names; empty for all that no priority names."""
    limit: float
    """Seconds that one may take after its process was prepared: a hang costs no more."""
    needs: float
    """Seconds below which one is not begun."""


@dataclass(frozen=True)
class Plan:
    """What is measured, and for how long."""

    recipes: tuple[tuple[str, Mapping[str, object]], ...]
    """Their names, with the changes to them."""
    priorities: tuple[Priority, ...]
    seconds: float
    """For the timed iterations of a contender."""
    fewest: int
    """Iterations that are timed at least."""
    profiled: int
    """Iterations whose kernels are counted."""


KERNELS = 25
PLAN = Plan(
    recipes=(("mnist-dfad", {}), ("cifar10-dfad", {}), ("cifar10-mad", {}), ("imagenet-mad", UNCONDITIONAL)),
    priorities=(
        Priority(("plain", "engine", COMPILED), limit=75, needs=10),
        Priority(("engine, eager",), limit=45, needs=10),
        Priority((), limit=45, needs=10),
    ),
    seconds=2.0,
    fewest=5,
    profiled=2,
)
REHEARSAL = Plan(
    recipes=(("digits-mad", {"loop.batch_size": 8, "loop.student_steps": 2, "generator.width": 4}),),
    priorities=(Priority(("plain", "engine"), limit=60, needs=1), Priority(("+ fused kernels",), limit=60, needs=1)),
    seconds=0.0,
    fewest=2,
    profiled=1,
)


@dataclass(frozen=True)
class Case:
    """One contender of a recipe."""

    recipe: Recipe
    contender: str
    build: Callable[[], Contender]
    """Called in another process, so that it must be picklable."""
    priority: Priority

    @property
    def name(self) -> str:
        """Of its records."""
        return f"{self.recipe.name} / {self.contender}"


class Job(NamedTuple):
    """What a process compiles."""

    name: str
    """Of the case."""
    build: Callable[[], Contender]


@dataclass
class Standing:
    """The times of a recipe's contenders so far."""

    resumed: bool
    """Whether an earlier call measured some of them, whose times are not known here."""
    times: dict[str, Times] = field(default_factory=dict)


def run(context: Context) -> None:
    """Record a row for each contender: the seconds, memory and kernels of an iteration; and a row for each of its most expensive kernels.

    Each contender runs alone on the device, in a process of its own. One that fails, hangs, or could not be captured although it should
    be, is a failed case and affects no other.
    """
    plan = REHEARSAL if context.rehearse else PLAN
    groups = _cases(plan, context.device)
    cases = [case for group in groups for case in group]
    standings = {
        recipe: Standing(any(case.name in context.done for case in cases if case.recipe.name == recipe))
        for recipe in dict.fromkeys(case.recipe.name for case in cases)
    }
    left = sum(case.name not in context.done for case in cases)
    with Workers(left, partial(prepare, context.rehearse)) as workers:
        _compile(context, [case for case in cases if case.contender == COMPILED and case.name not in context.done])
        for group in groups:
            needs = max((case.priority.needs for case in group), default=0.0)
            for case in context.cases(group, lambda case: case.name, needs=needs):
                with context.attempt(case.name):
                    _measure(context, plan, case, workers, standings[case.recipe.name])


def prepare(rehearse: bool) -> None:
    """What every process calls first: with it, the process imports this module and with it all that measures."""
    if rehearse:
        rehearsal.prepare()
    # The same wherever something is compiled, as the caches' keys depend on it.
    torch._inductor.config.compile_threads = max(1, (os.cpu_count() or 1) // len(PLAN.recipes))
    # Where several processes share a GPU, the fastest configuration of a kernel cannot be told: it is chosen again where it is timed.
    torch._inductor.config.autotune_local_cache = False


def compile_job(rehearse: bool, job: Job) -> float:
    """Compile what a contender needs into the caches on disk; return the seconds it took."""
    begin = time.monotonic()
    prepare(rehearse)
    job.build().run(1)
    return time.monotonic() - begin


def _compile(context: Context, cases: list[Case]) -> None:
    """Compile for all cases at once. What does not compile here is compiled, or fails, where it is measured."""
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
    """The cases by priority, most important first."""
    precision = resolve_precision("auto", device)
    recipes = [load_recipe(name, changes) for name, changes in plan.recipes]
    for recipe in recipes:
        check(recipe)
    named = {name for priority in plan.priorities for name in priority.contenders}
    return [
        [
            Case(recipe, name, partial(build, recipe, device, precision, name, graphs=True), priority)
            for recipe in recipes
            for name in priority.contenders or [name for name in contenders(recipe, device, precision, graphs=True) if name not in named]
        ]
        for priority in plan.priorities
    ]


def _measure(context: Context, plan: Plan, case: Case, workers: Workers, standing: Standing) -> None:
    """Record a contender's times, then its memory, then its kernels: a part that fails loses none of those before it."""
    begin, end = time.monotonic(), context.deadline - MARGIN
    part = case.name

    def seconds_left() -> float:
        return max(end - time.monotonic(), 0.1)

    try:
        worker = workers.take(seconds_left())
        begin = time.monotonic()
        end = min(begin + case.priority.limit, end)
        start = worker.call(measuring.begin, case.build, context.device, limit=seconds_left())
        standing.times[case.contender] = worker.call(measuring.time_for, plan.seconds, plan.fewest, limit=seconds_left())
        row_with = partial(
            row_of,
            case.recipe,
            case.contender,
            standing.times,
            in_turns=False,
            precision=resolve_precision("auto", context.device),
            provenance=measured_on(*(context.origin[name] for name in ("device", "command", "commit"))),
            **start._asdict(),
        )
        _record(context, case, row_with(memory=None), begin)
        if case.contender in TITLES:
            _record_line(context, case.recipe, standing)
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
    """Record what is known of a contender so far; its last record counts."""
    quartiles = (row.lower_quartile_seconds, row.upper_quartile_seconds)
    facts = [
        f"{_ms(row.seconds_per_iteration)} ms/iteration ({' to '.join(map(_ms, filter(None, quartiles)))}; {row.turns} iterations)",
        f"student's {_ms(row.student_seconds)}",
        row.autocast,
        f"TF32 {row.tf32}" if row.tf32 == "nowhere" else f"TF32 in {row.tf32}" if row.tf32 else "",
        f"{row.reserved_mib:.0f} MiB" if row.reserved_mib is not None else "",
        f"{row.kernels_per_iteration:.0f} kernels" if row.kernels_per_iteration is not None else "",
        row.notes,
    ]
    seconds = round(time.monotonic() - begin, 2)
    context.record(case.name, text=", ".join(filter(None, facts)), seconds=seconds, table="end-to-end", row=table.cells(row))


def _record_line(context: Context, recipe: Recipe, standing: Standing) -> None:
    """Record one line with all times of a recipe; what an earlier call measured has a line of its own."""
    medians = {name: statistics.median(seconds for _, seconds in times) for name, times in standing.times.items()}
    facts = []
    for name, title in TITLES.items():
        if name in medians:
            peers = ("plain",) if name == COMPILED else ("plain", COMPILED)
            ratios = [f"{medians[peer] / medians[name]:.2f} × {TITLES[peer]}" for peer in peers if peer in medians and name != peer]
            compared = f" ({', '.join(ratios)})" if ratios else ""
            facts.append(f"{title} {_ms(medians[name])} ms{compared}")
    case = f"{recipe.name}, resumed" if standing.resumed else recipe.name
    context.record(case, text=f"{recipe.name} {recipe.loop.batch_size}: {', '.join(facts)}", highlight=True, table="comparison")


def _record_kernels(context: Context, case: Case, profile: Profile) -> None:
    for rank, kernel in enumerate(profile.most_expensive, 1):
        row = {"recipe": case.recipe.name, "batch_size": case.recipe.loop.batch_size, "contender": case.contender, "rank": rank}
        text = (
            f"{kernel.us_per_iteration:.1f} µs/iteration, {100 * kernel.share:.1f} %, {kernel.calls_per_iteration:g} calls: {kernel.name}"
        )
        context.record(f"{case.name}: kernel {rank}", text=text[:200], table="kernels", row=row | asdict(kernel))


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:.0f}"
