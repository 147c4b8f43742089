"""What a run leaves for its reader: progress, logs, pictures, summary."""

from .compare import COLUMNS, check_picture, draw_comparison, read_run, table_rows
from .folder import RunFolder
from .progress import Progress

__all__ = ["COLUMNS", "Progress", "RunFolder", "check_picture", "draw_comparison", "read_run", "table_rows"]
