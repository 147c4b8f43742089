"""From workloads to rows: check, time, compare."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch._inductor.config

from dfkd_fast.errors import first_line
from dfkd_fast.kernels import Backend

from ..provenance import Provenance
from . import check, timing
from .rows import Row
from .workload import Mode, Provider, Results, Trial, Workload, usual_backends

__all__ = ["Run"]


class Examined(NamedTuple):
    """What the check said of a provider."""

    status: str
    error: float | None = None
    trial: Trial | None = None
    """Where it may be timed."""


@dataclass(frozen=True)
class Run:
    """How cases are measured.

    Args:
        device: where.
        modes: which ones; all where there are none.
        providers: who, likewise; eager is always checked, because its error says what the others are allowed.
        repeats: measured calls a provider; None for as many as fit into ``seconds``.
        turn: the clock (``timing.turn_on``).
        copy_bandwidth: of the device, in bytes a second.
        provenance: of all rows.
        backends: ours that are measured; None for those that are made for the device.
        seconds: for the measured calls of all providers of a case.
    """

    device: torch.device
    modes: Sequence[str]
    providers: Sequence[str]
    repeats: int | None
    turn: timing.Turn
    copy_bandwidth: float
    provenance: Provenance
    backends: Sequence[Backend] | None = None
    seconds: float = timing.CASE_SECONDS

    def rows(self, workload: Workload) -> Iterator[list[Row]]:
        """The rows of one workload, a list a case."""
        modes = [mode for mode in workload.modes if not self.modes or mode in self.modes]
        torch.compiler.reset()  # a function that was compiled for too many sizes is no longer compiled for the next
        torch._inductor.config.compile_threads = 1  # no pool of compilers that starts while others are timed
        providers = workload.providers(self.device, usual_backends(self.device) if self.backends is None else self.backends)
        for mode in modes:
            yield self._case(workload, mode, providers)

    def _case(self, workload: Workload, mode: Mode, providers: Sequence[Provider]) -> list[Row]:
        chosen = [provider for provider in providers if not self.providers or provider.name in self.providers]
        if not chosen:
            return []
        expected = workload.expected(mode, self.device)
        of_eager = check.errors(workload.trial(providers[0], mode, self.device).results(), expected)
        examined = {provider.name: self._examine(workload, mode, provider, expected, of_eager) for provider in chosen}
        ready = {name: timing.ready(found.trial, self.device) for name, found in examined.items() if found.trial is not None}
        seconds = timing.measure({name: timed.trial for name, timed in ready.items()}, self.turn, self.repeats, self.seconds)
        rows = [
            self._row(workload, mode, name, found, ready[name].timed if name in ready else "", seconds.get(name))
            for name, found in examined.items()
        ]
        medians = {row.provider: row.median_us for row in rows}
        return [
            replace(
                row,
                speedup_over_eager=_ratio(medians.get("eager"), row.median_us),
                speedup_over_compile=_ratio(medians.get("compile"), row.median_us),
            )
            for row in rows
        ]

    def _examine(self, workload: Workload, mode: Mode, provider: Provider, expected: Results, of_eager: dict[str, float]) -> Examined:
        if provider.absent is not None:
            return Examined(f"not installed: {provider.absent}")
        try:
            trial = workload.trial(provider, mode, self.device)
            found = trial.results()
        except Exception as error:  # whatever a peer raises is its row's business, and ends nothing else
            return Examined(f"failed: {type(error).__name__}: {first_line(error)}")
        errors = check.errors(found, expected)
        largest = max(errors.values(), default=0.0)
        wrong = check.mismatch(found, expected, of_eager, provider.lacks, errors)
        if wrong is not None:
            return Examined(f"wrong: {wrong}", largest)
        return Examined(f"ok, without {' and '.join(provider.lacks)}" if provider.lacks else "ok", largest, trial)

    def _row(self, workload: Workload, mode: Mode, provider: str, examined: Examined, timed: str, seconds: list[float] | None) -> Row:
        row = Row(
            kernel=workload.kernel,
            variant=workload.variant,
            mode=mode,
            size=workload.size,
            dtype=str(workload.dtype).removeprefix("torch."),
            layout=workload.layout,
            provider=provider,
            status=examined.status,
            error=examined.error,
            copy_gb_per_s=self.copy_bandwidth / 1e9,
            provenance=self.provenance,
        )
        if examined.trial is None or not seconds:
            return row
        q20, median, q80 = np.quantile(seconds, (0.2, 0.5, 0.8))
        bandwidth = workload.floor_bytes(mode) / median
        return replace(
            row,
            timed=timed,
            median_us=float(median * 1e6),
            q20_us=float(q20 * 1e6),
            q80_us=float(q80 * 1e6),
            calls=len(seconds),
            gb_per_s=float(bandwidth / 1e9),
            share_of_copy=float(bandwidth / self.copy_bandwidth),
            peak_memory_bytes=timing.peak_memory_bytes(examined.trial, self.device),
        )


def _ratio(baseline: float | None, time: float | None) -> float | None:
    return baseline / time if baseline and time else None
