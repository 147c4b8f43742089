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
from .workload import Mode, Provider, Results, Trial, Workload, default_backends

__all__ = ["Run"]


class Checked(NamedTuple):
    """Result of the correctness check of a provider."""

    status: str
    error: float | None = None
    trial: Trial | None = None
    """None if the provider must not be timed."""


@dataclass(frozen=True)
class Run:
    """Configuration of a benchmark run.

    Args:
        device: device to benchmark.
        modes: modes to measure; all if empty.
        providers: providers to measure; all if empty. Eager is always run, because its error determines the tolerance.
        repeats: measured calls per provider; None for as many as fit into ``seconds``.
        timer: from ``timing.timer_for``.
        copy_bandwidth: copy bandwidth of the device in bytes/s.
        provenance: provenance of all rows.
        backends: our backends to measure; None for the default ones of the device.
        seconds: time budget for the measured calls of all providers of a case.
    """

    device: torch.device
    modes: Sequence[str]
    providers: Sequence[str]
    repeats: int | None
    timer: timing.Timer
    copy_bandwidth: float
    provenance: Provenance
    backends: Sequence[Backend] | None = None
    seconds: float = timing.CASE_SECONDS

    def rows(self, workload: Workload) -> Iterator[list[Row]]:
        """Yield the rows of a workload, one list per case."""
        modes = [mode for mode in workload.modes if not self.modes or mode in self.modes]
        torch.compiler.reset()  # Dynamo stops recompiling a function after too many sizes
        torch._inductor.config.compile_threads = 1  # no compiler processes in the background of measurements
        providers = workload.providers(self.device, default_backends(self.device) if self.backends is None else self.backends)
        for mode in modes:
            yield self._case(workload, mode, providers)

    def _case(self, workload: Workload, mode: Mode, providers: Sequence[Provider]) -> list[Row]:
        chosen = [provider for provider in providers if not self.providers or provider.name in self.providers]
        if not chosen:
            return []
        expected = workload.expected(mode, self.device)
        eager_errors = check.errors(workload.trial(providers[0], mode, self.device).results(), expected)
        checked = {provider.name: self._check(workload, mode, provider, expected, eager_errors) for provider in chosen}
        ready = {name: timing.ready(result.trial, self.device) for name, result in checked.items() if result.trial is not None}
        seconds = timing.measure({name: timed.trial for name, timed in ready.items()}, self.timer, self.repeats, self.seconds)
        rows = [
            self._row(workload, mode, name, result, ready[name].timed if name in ready else "", seconds.get(name))
            for name, result in checked.items()
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

    def _check(self, workload: Workload, mode: Mode, provider: Provider, expected: Results, eager_errors: dict[str, float]) -> Checked:
        if provider.unavailable is not None:
            return Checked(f"not installed: {provider.unavailable}")
        try:
            trial = workload.trial(provider, mode, self.device)
            actual = trial.results()
        except Exception as error:  # an error of one provider must not end the run
            return Checked(f"failed: {type(error).__name__}: {first_line(error)}")
        errors = check.errors(actual, expected)
        largest = max(errors.values(), default=0.0)
        rounded = dict.fromkeys(workload.rounded, workload.dtype)
        wrong = check.mismatch(actual, expected, eager_errors, provider.omitted, errors, rounded)
        if wrong is not None:
            return Checked(f"wrong: {wrong}", largest)
        return Checked(f"ok, without {' and '.join(provider.omitted)}" if provider.omitted else "ok", largest, trial)

    def _row(self, workload: Workload, mode: Mode, provider: str, checked: Checked, timed: str, seconds: list[float] | None) -> Row:
        row = Row(
            kernel=workload.kernel,
            variant=workload.variant,
            mode=mode,
            size=workload.size,
            dtype=str(workload.dtype).removeprefix("torch."),
            layout=workload.layout,
            provider=provider,
            status=checked.status,
            error=checked.error,
            copy_gb_per_s=self.copy_bandwidth / 1e9,
            provenance=self.provenance,
        )
        if checked.trial is None or not seconds:
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
            peak_memory_bytes=timing.peak_memory_bytes(checked.trial, self.device),
        )


def _ratio(baseline: float | None, time: float | None) -> float | None:
    return baseline / time if baseline and time else None
