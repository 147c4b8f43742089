"""What a run leaves for its reader: progress, logs, pictures, summary."""

from .folder import RunFolder
from .progress import Progress
from .tables import print_table

__all__ = ["Progress", "RunFolder", "print_table"]
