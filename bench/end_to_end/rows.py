"""The rows of results, one for each contender, and the CSV that holds them."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfkd_fast import Recipe

from .. import table
from ..provenance import LOOPS, Provenance
from .contenders import Times, current_name

__all__ = ["CASE", "SPEEDUPS", "Memory", "Row", "read", "row_of", "write"]

CASE = ("recipe", "batch_size", "precision", "device")
"""Columns that identify a case: the contenders with equal values are compared with each other."""
SPEEDUPS = {
    "plain": "speedup_over_plain",
    "plain compiled": "speedup_over_plain_compiled",
    "plain compiled + malloc reuse": "speedup_over_plain_compiled_malloc_reuse",
}
"""Peers, from weakest to strongest, and the columns with the speedups over them."""


@dataclass(frozen=True)
class Memory:
    """Peak memory of an iteration, in MiB."""

    iteration: float
    """Allocated during the iteration, in addition to what is allocated between iterations."""
    student_steps: float | None
    """As ``iteration``, of the student steps only; None if they are replayed as a CUDA graph."""
    allocated: float
    """Peak of all tensors, including those that live between iterations."""
    reserved: float
    """Peak of what PyTorch's caching allocator reserves, including the memory pools of CUDA graphs, which ``allocated`` omits."""


@dataclass(frozen=True)
class Row:
    """Results of one contender."""

    recipe: str
    batch_size: int
    precision: str
    """Precision of the engine and of the compiled plain loop."""
    contender: str
    seconds_per_iteration: float
    """Median over the timed iterations, each with all student and generator steps."""
    student_seconds: float
    generator_seconds: float
    iterations_per_second: float
    images_per_second: float
    """Images generated for the student and the generator steps."""
    speedup_over_plain: float | None
    """If iterations were interleaved, the median of their ratios, else the ratio of the medians; None if the peer was not timed."""
    speedup_over_plain_compiled: float | None
    speedup_over_plain_compiled_malloc_reuse: float | None
    """Over the strongest peer on a CPU; None on a GPU, where malloc reuse does not apply."""
    peak_memory_mib: float | None
    """As :attr:`Memory.iteration`; None for compiled contenders on a CPU, where the compiler's own memory dominates."""
    imitation_memory_mib: float | None
    """As :attr:`Memory.student_steps`."""
    turns: int
    """Number of timed iterations."""
    provenance: Provenance = field(kw_only=True, metadata={"columns": LOOPS})
    lower_quartile_seconds: float | None = None
    """Over the timed iterations; None for fewer than two."""
    upper_quartile_seconds: float | None = None
    allocated_mib: float | None = None
    """As :attr:`Memory.allocated`."""
    reserved_mib: float | None = None
    """As :attr:`Memory.reserved`."""
    autocast: str = ""
    """Compute precision of this contender's networks."""
    tf32: str = ""
    """Which of this contender's float32 operations may use TF32; empty on a CPU."""
    captured: bool = False
    """Whether the steps are replayed as CUDA graphs."""
    notes: str = ""
    """Settings that the engine could not apply as requested."""
    warm_up_seconds: float | None = None
    """Time of the first two iterations, in which networks are compiled and steps are captured."""
    kernels_per_iteration: float | None = None
    """Kernels and memory copies that run on the device; None if not profiled."""
    kernels_per_step: float | None = None
    """``kernels_per_iteration`` divided by the number of student and generator steps."""
    kernel_seconds: float | None = None
    """Sum of the kernels' times in an iteration."""


def row_of(
    recipe: Recipe,
    name: str,
    times: Mapping[str, Times],
    memory: Memory | None,
    *,
    interleaved: bool,
    **others: Any,
) -> Row:
    """Return a contender's row.

    Args:
        recipe: recipe that was run.
        name: name of the contender.
        times: times of all contenders so far, by name.
        memory: peak memory of this contender, if measured.
        interleaved: whether the contenders' iterations were interleaved, so that times with the same index were measured together.
        others: remaining fields of the row.
    """
    replayed = recipe.replay.num_rows(recipe.loop.batch_size) if recipe.replay.replays else 0
    images = recipe.loop.student_steps * (recipe.loop.batch_size + replayed) + recipe.loop.generator_steps * recipe.loop.batch_size
    student, seconds = (statistics.median(column) for column in zip(*times[name], strict=True))

    def speedup(peer: str) -> float | None:
        if peer not in times:
            return None
        ours, theirs = ([total for _, total in times[one]] for one in (name, peer))
        if interleaved:
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
        speedup_over_plain_compiled=speedup("plain compiled"),
        speedup_over_plain_compiled_malloc_reuse=speedup("plain compiled + malloc reuse"),
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
    """Write rows to a CSV, replacing the rows with the same recipe, batch size, precision and device."""
    table.replace(path, table.names(Row), list(map(table.cells, rows)), CASE)


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV by column, with the current names of contenders; a value that was not measured is an empty string."""
    return [{**dict.fromkeys(SPEEDUPS.values(), ""), **row, "contender": current_name(row["contender"])} for row in table.read(path)]
