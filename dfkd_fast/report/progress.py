"""A progress bar on a terminal, log lines elsewhere."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Self, SupportsFloat

from rich import progress
from rich.console import Console

from dfkd_fast.engine import Epoch
from dfkd_fast.log import LOGGER

__all__ = ["Progress"]

MIN_INTERVAL = 2.0
"""Seconds between two lines, except those of the first and the last epoch."""
MAX_INTERVAL = 600.0
"""Seconds after which an iteration is logged."""
FIRST = 3
"""Iterations before the first line of a long epoch."""
LONG = 60.0
"""Seconds above which an epoch is long."""
PARTS = 10
"""Parts of the generator's pretraining, which are logged as epochs are."""


class _Stage:
    """A bar, and the log lines, of a training that consists of parts, such as epochs.

    Args:
        bar: to which a task is added.
        name: at the start of the bar and of every line.
        unit: that is counted, such as iterations.
        total: number of units.
        per_part: units per part; the last part may be shorter.
        done: units completed before, in a resumed run.
        clock: returns seconds since the Unix epoch.
    """

    def __init__(
        self, bar: progress.Progress, name: str, unit: str, total: int, per_part: int, done: int, clock: Callable[[], float]
    ) -> None:
        self.bar = bar
        self.name = name
        self.unit = unit
        self.total = total
        self.per_part = per_part
        self.clock = clock
        self.task = bar.add_task(name, total=total, completed=done, metrics="")
        self.restart(done, clock())

    def restart(self, done: int, now: float) -> None:
        """Measure the pace from here on: what came before is not a part of this stage."""
        self.start = done, now
        """Units done in earlier processes, and the time at which this one began with the next."""
        self.last_line = done, now
        """Units done at the last line, and its time."""
        self.first_line: tuple[int, float] | None = None
        """The same of the first line: units before it may be slower, since they compile and warm up."""

    def is_due(self, done: int) -> bool:
        """Whether a line is due after this number of units."""
        silence = self.clock() - self.last_line[1]
        if done % self.per_part == 0 or done == self.total:
            return silence >= MIN_INTERVAL or done - self.start[0] <= self.per_part or done == self.total
        return silence >= MAX_INTERVAL or (done - self.start[0] == FIRST and self._pace(done, self.last_line) * self.per_part > LONG)

    def show(self, done: int, position: str, metrics: str = "", seconds: float | None = None) -> None:
        """Log a line, unless the bar shows the same.

        Args:
            done: units done.
            position: the part and unit, as text.
            metrics: losses and accuracy, as text.
            seconds: of the epoch that is complete; None within one.
        """
        now, pace = self.clock(), self._pace(done, self.last_line)
        overall = self._pace(done, self.first_line or self.start)  # an epoch with an evaluation is not like the next one
        self.last_line = done, now
        self.first_line = self.first_line or self.last_line
        parts = (
            time.strftime("%H:%M:%S", time.localtime(now)),
            f"{self.name} {position}",
            metrics,
            "" if seconds is None else f"{_number(seconds)} s/epoch",
            f"{_number(pace)} s/{self.unit}",
            f"{timedelta(seconds=round(overall * (self.total - done)))} left",
        )
        if not self.bar.console.is_terminal:
            LOGGER.info("%s", "  ".join(filter(None, parts)))

    def _pace(self, done: int, since: tuple[int, float]) -> float:
        """Mean seconds per unit since a number of units and its time."""
        return (self.clock() - since[1]) / max(1, done - since[0])


class Progress:
    """Shows the progress of a training: losses, accuracy and the estimated time left.

    If the console is not a terminal, lines with the time of day are logged instead of a bar: one per epoch, and one per tenth of the
    generator's pretraining, but at most one every two seconds, except for the first and the last. A line also follows the first
    iterations of a long epoch, and ten minutes without a line.

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
        self._training = _Stage(self.bar, name, "iteration", epochs * iterations_per_epoch, iterations_per_epoch, done, clock)
        self._pretraining: _Stage | None = None
        self._epoch_start = clock()

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def pretraining(self, done: int, total: int, losses: Mapping[str, SupportsFloat]) -> None:
        """Report a step of the generator's pretraining.

        Args:
            done: number of steps done, 1 or more.
            total: number of steps of the pretraining.
            losses: of this step by name. They are read, which synchronizes a GPU, only when they are shown.
        """
        if self._pretraining is None:
            self._pretraining = _Stage(self.bar, "generator pretraining", "step", total, math.ceil(total / PARTS), done - 1, self.clock)
            self._pretraining.restart(done - 1, self._training.last_line[1])  # the first step has been timed, too
        stage = self._pretraining
        self.bar.update(stage.task, completed=done)
        if stage.is_due(done):
            metrics = _metrics(losses)
            self.bar.update(stage.task, metrics=metrics)
            stage.show(done, f"{done}/{total}", metrics)
        if done == total:
            self.bar.update(stage.task, visible=False)
            self.begin_training()

    def begin_training(self) -> None:
        """Report that all that comes before the first epoch is done, such as the generator's pretraining."""
        self._epoch_start = self.clock()
        self._training.restart(self._training.start[0], self._epoch_start)

    def iteration(self, done: int) -> None:
        """Report the number of iterations done since the start of the training."""
        self.bar.update(self._training.task, completed=done)
        within = done % self.iterations_per_epoch
        if within and self._training.is_due(done):  # the end of an epoch is shown by epoch()
            self._training.show(
                done, f"{done // self.iterations_per_epoch + 1}/{self.epochs}, iteration {within}/{self.iterations_per_epoch}"
            )

    def epoch(self, epoch: Epoch) -> None:
        """Report a finished epoch."""
        metrics, position = _metrics(epoch.losses), f"{epoch.number}/{self.epochs}"
        if epoch.relative_bn_moments is not None:
            metrics += f"  relative bn_moments {epoch.relative_bn_moments:.3g}"
        if epoch.student_accuracy is not None:
            metrics += f"  {self.metric} {epoch.student_accuracy:.2f} %"
        if epoch.agreement is not None:
            metrics += f"  agreement {epoch.agreement:.2f} %"
        done = epoch.number * self.iterations_per_epoch
        self.bar.update(self._training.task, completed=done, metrics=f"{position}  {metrics}")
        if self._training.is_due(done):
            self._training.show(done, position, metrics, self.clock() - self._epoch_start)
        self._epoch_start = self.clock()


def _metrics(losses: Mapping[str, SupportsFloat]) -> str:
    return "  ".join(f"{name} {float(value):.4g}" for name, value in losses.items())


def _number(value: float) -> str:
    """Three significant digits, and all digits before the point."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
