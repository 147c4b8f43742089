"""The output of a run: progress, logs, plots and summary."""

from .compare import COLUMNS, check_plot, plot_comparison, read_run, table_rows
from .folder import RunFolder
from .progress import Progress

__all__ = ["COLUMNS", "Progress", "RunFolder", "check_plot", "plot_comparison", "read_run", "table_rows"]
