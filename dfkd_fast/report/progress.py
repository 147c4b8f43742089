"""A progress bar on a terminal, a line now and then elsewhere."""

from types import TracebackType
from typing import Self

from rich import progress
from rich.console import Console

from dfkd_fast.engine import Epoch

__all__ = ["Progress"]


class Progress:
    """Shows how far a training is, its losses and accuracy, and the time left.

    Args:
        console: where it is shown; where that is no terminal, about ten plain lines are printed instead.
        name: what is trained.
        epochs: how many there are.
        iterations_per_epoch: how often :meth:`iteration` will be called an epoch.
        done: iterations done before, in an interrupted run.
        metric: what the accuracy is.
    """

    def __init__(
        self, console: Console, name: str, epochs: int, iterations_per_epoch: int = 1, done: int = 0, metric: str = "top-1 accuracy"
    ) -> None:
        self.console = console
        self.name = name
        self.epochs = epochs
        self.iterations_per_epoch = iterations_per_epoch
        self.metric = metric
        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=None),
            progress.TextColumn("{task.fields[figures]}"),
            progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(name, total=epochs * iterations_per_epoch, completed=done, figures="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def iteration(self, done: int) -> None:
        """So many iterations are done in all."""
        self.bar.update(self.task, completed=done)

    def epoch(self, epoch: Epoch) -> None:
        """An epoch is done."""
        figures = "  ".join(f"{name} {value:.4g}" for name, value in epoch.losses.items())
        if epoch.student_accuracy is not None:
            figures += f"  {self.metric} {epoch.student_accuracy:.2f} %"
        self.bar.update(self.task, completed=epoch.number * self.iterations_per_epoch, figures=f"{epoch.number}/{self.epochs}  {figures}")
        if not self.console.is_terminal and (epoch.number % max(1, self.epochs // 10) == 0 or epoch.number == self.epochs):
            self.console.print(f"{self.name} {epoch.number}/{self.epochs}  {figures}", highlight=False, soft_wrap=True)
