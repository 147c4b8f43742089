"""``dfkd-fast compare``: results of several runs."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dfkd_fast.console import print_line, print_table
from dfkd_fast.errors import DfkdError
from dfkd_fast.report import COLUMNS, check_plot, plot_comparison, read_run, table_rows
from dfkd_fast.report.compare import FinishedRun

__all__ = ["compare_runs"]

LEGEND = (
    "last 75%: without the first quarter of the epochs; largest drop: from a previous peak, in percentage points;",
    "retained: fraction of epochs at most report.retained_within points below the teacher",
)


def compare_runs(runs: Sequence[Path], plot: Path, console: Console, *, over_minutes: bool = False) -> None:
    """Print the accuracies and retention statistics of finished runs as a table, and plot them.

    Args:
        runs: folders of finished runs.
        plot: file of the plot.
        console: for the table.
        over_minutes: whether accuracy is plotted over minutes instead of epochs.

    Raises:
        DfkdError: a folder has no finished run, a run is given twice, or the plot cannot be written.
    """
    check_plot("--out", plot)
    for index, run in enumerate(runs):
        if any(run.exists() and other.exists() and run.samefile(other) for other in runs[:index]):
            raise DfkdError(f"{run} is given twice")
    finished = [read_run(run) for run in runs]
    print_table(console, ("run", "teacher", *COLUMNS.values()), table_rows(finished), figures=True)
    for line in (*_metrics(finished), *LEGEND):
        print_line(console, line)
    plot_comparison(finished, plot, over_minutes=over_minutes)
    print_line(console, str(plot))


def _metrics(runs: Sequence[FinishedRun]) -> list[str]:
    """Returns one line per metric with the runs that it was measured in; none if all runs have the same metric on test images."""
    paths: dict[str, list[str]] = {}
    for run in runs:
        paths.setdefault(run.metric, []).append(str(run.path))
    if len(paths) == 1 and not any("held-out" in metric for metric in paths):
        return []
    lines = [f"{metric}: {', '.join(of_metric)}" for metric, of_metric in paths.items()]
    return lines if len(paths) == 1 else [*lines, "these metrics are not comparable with each other"]
