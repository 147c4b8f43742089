"""A progress bar on a terminal, a line now and then elsewhere."""

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
"""Iterations before the first line of an epoch that is long."""
LONG = 60.0
"""Seconds of such an epoch."""
SILENCE = 600.0
"""Seconds without a line, at most, as far as iterations end in time."""


class Progress:
    """Shows how far a training is, its losses and accuracy, and the time left.

    Where the console is no terminal it logs lines, with the time of day, instead of a bar: about ten of epochs, another when there was
    none for ten minutes, and an early one, so that a log shows that something happens.

    Args:
        console: where the bar is shown, unless information is not logged.
        name: what is trained.
        epochs: how many there are.
        iterations_per_epoch: how often :meth:`iteration` will be called an epoch.
        done: iterations done before, in an interrupted run.
        metric: what the accuracy is.
        clock: seconds since 1970.
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
            progress.TextColumn("{task.fields[figures]}"),
            progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal or not LOGGER.isEnabledFor(logging.INFO),
        )
        self.task = self.bar.add_task(name, total=epochs * iterations_per_epoch, completed=done, figures="")
        self._begin = done
        self._said = done, clock()
        """Iterations done at the last line, and when that was."""

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def iteration(self, done: int) -> None:
        """So many iterations are done in all."""
        self.bar.update(self.task, completed=done)
        within = done % self.iterations_per_epoch
        if self.console.is_terminal or within == 0:  # at an epoch's end its figures are still to come
            return
        early = done - self._begin == FIRST and self._seconds_each(done) * self.iterations_per_epoch > LONG
        if early or self._is_silent:
            self._say(done, f"{done // self.iterations_per_epoch + 1}/{self.epochs}, iteration {within}/{self.iterations_per_epoch}")

    def epoch(self, epoch: Epoch) -> None:
        """An epoch is done."""
        figures = "  ".join(f"{name} {value:.4g}" for name, value in epoch.losses.items())
        if epoch.student_accuracy is not None:
            figures += f"  {self.metric} {epoch.student_accuracy:.2f} %"
        done = epoch.number * self.iterations_per_epoch
        self.bar.update(self.task, completed=done, figures=f"{epoch.number}/{self.epochs}  {figures}")
        due = epoch.number % max(1, self.epochs // 10) == 0 or epoch.number == self.epochs
        if not self.console.is_terminal and (due or self._is_silent):
            self._say(done, f"{epoch.number}/{self.epochs}", figures)

    @property
    def _is_silent(self) -> bool:
        return self.clock() - self._said[1] >= SILENCE

    def _seconds_each(self, done: int) -> float:
        """Of an iteration, since the last line."""
        before, then = self._said
        return (self.clock() - then) / max(1, done - before)

    def _say(self, done: int, where: str, figures: str = "") -> None:
        each = self._seconds_each(done)
        left = timedelta(seconds=round(each * (self.epochs * self.iterations_per_epoch - done)))
        now = self.clock()
        parts = (time.strftime("%H:%M:%S", time.localtime(now)), f"{self.name} {where}", figures, f"{each:.3g} s/iteration", f"{left} left")
        LOGGER.info("%s", "  ".join(filter(None, parts)))
        self._said = done, now
