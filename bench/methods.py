"""Time and peak memory of an iteration of each recipe, relative to the first recipe."""

import multiprocessing
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dfkd_fast import Recipe, Trainer, load_recipe
from dfkd_fast.errors import DfkdError

from .end_to_end import networks
from .provenance import LOOPS, Provenance, measured_on

__all__ = ["Row", "measure"]

WARM_UP = 2


@dataclass(frozen=True)
class Row:
    """Time and peak memory of one recipe."""

    recipe: str
    fresh_rows: int
    replayed_rows: int
    iteration_ms: float
    """Median over the timed iterations, each with all student and generator steps."""
    times_first: float
    """Relative to the first recipe: the median of the ratios of interleaved iterations."""
    peak_memory_mib: float
    """Peak of a process that does nothing else; on a CPU its whole resident memory, including PyTorch."""
    memory_over_first_mib: float
    turns: int
    provenance: Provenance = field(kw_only=True, metadata={"columns": LOOPS})


def measure(names: Sequence[str], device: torch.device, turns: int, command: str) -> list[Row]:
    """Time interleaved iterations of the recipes with untrained networks, and measure peak memory in one process per recipe."""
    recipes = [load_recipe(name, {"loop.iterations_per_epoch": turns + WARM_UP + 1}) for name in names]
    trainers = [_trainer(recipe, device) for recipe in recipes]
    for _ in range(WARM_UP):
        for trainer in trainers:
            _seconds(trainer)
    provenance = measured_on(device, command)
    seconds = [[_seconds(trainer) for trainer in trainers] for _ in range(turns)]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = [pool.apply(_peak_memory, (name, device.type, torch.get_num_threads())) / 2**20 for name in names]
    rows = []
    for index, (recipe, trainer) in enumerate(zip(recipes, trainers, strict=True)):
        rows.append(
            Row(
                recipe=recipe.name,
                fresh_rows=recipe.loop.batch_size,
                replayed_rows=trainer.state.replay_source.rows if trainer.state.replay_source else 0,
                iteration_ms=round(1e3 * statistics.median(turn[index] for turn in seconds), 3),
                times_first=round(statistics.median(turn[index] / turn[0] for turn in seconds), 4),
                peak_memory_mib=round(memory[index], 1),
                memory_over_first_mib=round(memory[index] - memory[0], 1),
                turns=turns,
                provenance=provenance,
            )
        )
    return rows


def _trainer(recipe: Recipe, device: torch.device) -> Trainer:
    teacher, student, generator = networks(recipe)
    trainer = Trainer(teacher, student, generator, recipe, device=device)
    _seconds(trainer)
    if (replay_source := trainer.state.replay_source) is not None:
        for epoch in range(1, recipe.loop.epochs + 1):
            if not replay_source.ready:
                replay_source.end_epoch(epoch, trainer.state.fresh_batch)
        if not replay_source.ready:
            raise DfkdError(f"recipe {recipe.name!r}: its replay source stays empty")
    return trainer


def _seconds(trainer: Trainer) -> float:
    begin = time.perf_counter()
    trainer.iterate()
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _peak_memory(name: str, device_type: str, threads: int) -> int:
    torch.set_num_threads(threads)
    device = torch.device(device_type)
    trainer = _trainer(load_recipe(name), device)
    for _ in range(WARM_UP):
        _seconds(trainer)
    return trainer.state.clock.overall_peak_bytes()  # the clock resets the allocator's peak
