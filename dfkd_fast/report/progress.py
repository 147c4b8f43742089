"""A progress bar on a terminal, log lines elsewhere."""

import logging
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich import progress
from rich.console import Console

from dfkd_fast.engine import Epoch
from dfkd_fast.log import LOGGER

__all__ = ["Progress"]

FIRST = 3
"""Iterations before the first line of a long epoch."""
LONG = 60.0
"""Seconds above which an epoch is long."""
MAX_SILENCE = 600.0
"""Seconds after which an iteration is logged."""


class Progress:
    """Shows the progress of a training: losses, accuracy and the estimated time left.

    If the console is not a terminal, lines with the time of day are logged instead of a bar: about ten epochs, one more after ten minutes
    without a line, and one after the first iterations of a long epoch.

    Args:
        console: where the bar is shown, unless the log level is above info.
        name: of the trained network.
        epochs: their total number.
        iterations_per_epoch: number of calls of :meth:`iteration` per epoch.
        done: iterations completed before, in a resumed run.
        metric: name of the accuracy.
        clock: returns seconds since the Unix epoch.
    """

    def __init__(
        self,
        console: Console,
        name: str,
        epochs: int,
        iterations_per_epoch: int = 1,
        done: int = 0,
        metric: str = "top-1 accuracy",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.console = console
        self.name = name
        self.epochs = epochs
        self.iterations_per_epoch = iterations_per_epoch
        self.metric = metric
        self.clock = clock
        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=None),
            progress.TextColumn("{task.fields[metrics]}"),
            progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal or not LOGGER.isEnabledFor(logging.INFO),
        )
        self.task = self.bar.add_task(name, total=epochs * iterations_per_epoch, completed=done, metrics="")
        self._start = done
        self._last_line = done, clock()
        """Iterations done and time of the last line."""

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def iteration(self, done: int) -> None:
        """Report the number of iterations done since the start of the training."""
        self.bar.update(self.task, completed=done)
        within = done % self.iterations_per_epoch
        if self.console.is_terminal or within == 0:  # the end of an epoch is logged by epoch()
            return
        early = done - self._start == FIRST and self._seconds_per_iteration(done) * self.iterations_per_epoch > LONG
        if early or self._is_silent:
            self._log(done, f"{done // self.iterations_per_epoch + 1}/{self.epochs}, iteration {within}/{self.iterations_per_epoch}")

    def epoch(self, epoch: Epoch) -> None:
        """Report a finished epoch."""
        metrics = "  ".join(f"{name} {value:.4g}" for name, value in epoch.losses.items())
        if epoch.relative_bn_moments is not None:
            metrics += f"  relative bn_moments {epoch.relative_bn_moments:.3g}"
        if epoch.student_accuracy is not None:
            metrics += f"  {self.metric} {epoch.student_accuracy:.2f} %"
        done = epoch.number * self.iterations_per_epoch
        self.bar.update(self.task, completed=done, metrics=f"{epoch.number}/{self.epochs}  {metrics}")
        due = epoch.number % max(1, self.epochs // 10) == 0 or epoch.number == self.epochs
        if not self.console.is_terminal and (due or self._is_silent):
            self._log(done, f"{epoch.number}/{self.epochs}", metrics)

    @property
    def _is_silent(self) -> bool:
        return self.clock() - self._last_line[1] >= MAX_SILENCE

    def _seconds_per_iteration(self, done: int) -> float:
        """Mean since the last line."""
        iterations, then = self._last_line
        return (self.clock() - then) / max(1, done - iterations)

    def _log(self, done: int, position: str, metrics: str = "") -> None:
        pace = self._seconds_per_iteration(done)
        left = timedelta(seconds=round(pace * (self.epochs * self.iterations_per_epoch - done)))
        now = self.clock()
        parts = (
            time.strftime("%H:%M:%S", time.localtime(now)),
            f"{self.name} {position}",
            metrics,
            f"{pace:.3g} s/iteration",
            f"{left} left",
        )
        LOGGER.info("%s", "  ".join(filter(None, parts)))
        self._last_line = done, now
