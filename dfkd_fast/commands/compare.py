"""``dfkd-fast compare``: what runs came to."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dfkd_fast.console import print_line, print_table
from dfkd_fast.errors import DfkdError
from dfkd_fast.report import COLUMNS, check_picture, draw_comparison, read_run, table_rows

__all__ = ["compare_runs"]

LEGEND = (
    "var: variance; ¾: of the last three quarters of the epochs; drop: the largest from a previous peak; kept: fraction of the",
    "epochs at most report.retained_within points below the teacher",
)


def compare_runs(runs: Sequence[Path], picture: Path, console: Console) -> None:
    """Accuracies and retention statistics of finished runs, as a table and as a picture.

    Raises:
        DfkdError: a folder holds no finished run, or the picture cannot be written.
    """
    check_picture("--out", picture)
    for index, run in enumerate(runs):
        if any(run.exists() and other.exists() and run.samefile(other) for other in runs[:index]):
            raise DfkdError(f"{run} is given twice")
    finished = [read_run(run) for run in runs]
    print_table(console, ("run", "teacher", *COLUMNS.values()), table_rows(finished), figures=True)
    for line in LEGEND:
        print_line(console, line)
    draw_comparison(finished, picture)
    print_line(console, str(picture))
