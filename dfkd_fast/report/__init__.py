"""What a run leaves for its reader: progress, logs, pictures, summary."""

from .compare import COLUMNS, draw_comparison, read_run, table_rows
from .folder import RunFolder
from .progress import Progress
from .tables import print_line, print_table

__all__ = ["COLUMNS", "Progress", "RunFolder", "draw_comparison", "print_line", "print_table", "read_run", "table_rows"]
