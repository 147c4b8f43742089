"""Results: a row for each contender, a file of rows, and a plot of them."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dfkd_fast import Recipe
from dfkd_fast.files import replacing

from .. import table
from ..provenance import LOOPS, Provenance
from .contenders import Times

__all__ = ["Memory", "Row", "draw", "row_of", "write"]

CASE = ("recipe", "batch_size", "precision", "device")
"""Columns that tell the contenders of one case from those of others."""


@dataclass(frozen=True)
class Memory:
    """The peak memory of an iteration, in MiB."""

    iteration: float
    """Beyond what is held between iterations."""
    student_steps: float | None
    """The same of its student steps only; None where they are replayed as a CUDA graph."""
    allocated: float
    """Of all tensors, those that are held between iterations included."""
    reserved: float
    """Of what PyTorch's allocator reserves: the pools of CUDA graphs included, which ``allocated`` misses."""


@dataclass(frozen=True)
class Row:
    """One contender."""

    recipe: str
    batch_size: int
    precision: str
    """Of the engine and of the compiled plain loop."""
    contender: str
    seconds_per_iteration: float
    """Median over the turns: all the student's and the generator's steps."""
    student_seconds: float
    generator_seconds: float
    iterations_per_second: float
    images_per_second: float
    """Generated for the student and for the generator."""
    speedup_over_plain: float | None
    """For contenders that took turns, the median of the turns' ratios, else the ratio of the medians; None if the other was not timed."""
    speedup_over_plain_compiled: float | None
    peak_memory_mib: float | None
    """Of an iteration, beyond what is held between iterations; None for compiled contenders on a CPU, where compiling takes the most."""
    imitation_memory_mib: float | None
    """The same of its student steps only; None where they are replayed as a CUDA graph."""
    turns: int
    """Timed iterations."""
    provenance: Provenance = field(kw_only=True, metadata={"columns": LOOPS})
    lower_quartile_seconds: float | None = None
    """Of the iterations; None for fewer than two."""
    upper_quartile_seconds: float | None = None
    allocated_mib: float | None = None
    """Peak of all tensors; it misses the pools of CUDA graphs."""
    reserved_mib: float | None = None
    """Peak of what PyTorch's allocator reserves."""
    autocast: str = ""
    """What this contender's networks compute in."""
    tf32: str = ""
    """Where an NVIDIA GPU may use TF32, of what this contender computes in float32; empty on a CPU."""
    captured: bool = False
    """Whether its steps are replayed as CUDA graphs."""
    notes: str = ""
    """What the engine does differently from what was asked."""
    kernels_per_iteration: float | None = None
    """Kernels that the device runs, memory copies included; None if it was not profiled."""
    kernels_per_step: float | None = None
    """The same, divided by the number of the student's and generator's steps."""
    kernel_seconds: float | None = None
    """Of an iteration, summed over its kernels."""


def row_of(
    recipe: Recipe,
    name: str,
    times: Mapping[str, Times],
    memory: Memory | None,
    *,
    in_turns: bool,
    **others: Any,
) -> Row:
    """Return a contender's row.

    Args:
        recipe: what was run.
        name: of the contender.
        times: of all contenders so far, by name.
        memory: of this one, if it was measured.
        in_turns: whether the contenders took turns, so that times with the same index were taken together.
        others: the remaining fields of the row.
    """
    replayed = recipe.replay.num_rows(recipe.loop.batch_size) if recipe.replay.replays else 0
    images = recipe.loop.student_steps * (recipe.loop.batch_size + replayed) + recipe.loop.generator_steps * recipe.loop.batch_size
    student, seconds = (statistics.median(column) for column in zip(*times[name], strict=True))

    def speedup(other: str) -> float | None:
        if other not in times:
            return None
        ours, theirs = ([total for _, total in times[one]] for one in (name, other))
        if in_turns:
            return round(statistics.median(there / here for here, there in zip(ours, theirs, strict=True)), 3)
        return round(statistics.median(theirs) / seconds, 3)

    lower, upper = _quartiles([total for _, total in times[name]])
    return Row(
        recipe=recipe.name,
        batch_size=recipe.loop.batch_size,
        contender=name,
        seconds_per_iteration=round(seconds, 6),
        student_seconds=round(student, 6),
        generator_seconds=round(seconds - student, 6),
        iterations_per_second=round(1 / seconds, 4),
        images_per_second=round(images / seconds, 2),
        speedup_over_plain=speedup("plain"),
        speedup_over_plain_compiled=speedup("plain_compiled"),
        peak_memory_mib=memory.iteration if memory else None,
        imitation_memory_mib=memory.student_steps if memory else None,
        turns=len(times[name]),
        lower_quartile_seconds=lower,
        upper_quartile_seconds=upper,
        allocated_mib=memory.allocated if memory else None,
        reserved_mib=memory.reserved if memory else None,
        **others,
    )


def _quartiles(seconds: Sequence[float]) -> tuple[float | None, float | None]:
    if len(seconds) < 2:
        return None, None
    lower, _, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return round(lower, 6), round(upper, 6)


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write rows to a file, where they replace those of the same recipe, batch size, precision and device."""
    table.replace(path, table.names(Row), list(map(table.cells, rows)), CASE)


def _case(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in CASE)


def draw(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Plot a stacked bar for each contender of each case: the student's and the generator's seconds per iteration."""
    cases = list(dict.fromkeys(_case(row) for row in rows))
    figure = Figure(figsize=(9, 1 + 0.3 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(cases), 1, squeeze=False)[:, 0]
    for axes, case in zip(panels, cases, strict=True):
        bars = [row for row in rows if _case(row) == case][::-1]
        names = [row["contender"] for row in bars]
        student, generator = ([float(row[f"{network}_seconds"]) for row in bars] for network in ("student", "generator"))
        axes.barh(names, student, label="student's steps")
        axes.barh(names, generator, left=student, label="generator's step")
        for row, total in zip(bars, map(sum, zip(student, generator, strict=True)), strict=True):
            if row["speedup_over_plain"]:
                axes.text(total, row["contender"], f" {float(row['speedup_over_plain']):.1f} ×", va="center", fontsize=8)
        axes.set(title=f"{case[0]}, batch {case[1]}, {case[2]}, {case[3]}", xlabel="s/iteration")
        axes.set_xlim(0, 1.15 * max(map(sum, zip(student, generator, strict=True))))
        axes.grid(axis="x", alpha=0.3)
    panels[0].legend(loc="lower right")
    with replacing(path) as part:
        figure.savefig(part, dpi=120)
