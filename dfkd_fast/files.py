"""Writing files so that a crash, a full disk or a Ctrl-C never leaves half of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file that appears whole or not at all: write to the path given here; it takes ``path``'s place at the end.

    Raises:
        OSError: it could not be written; what stood at ``path`` is untouched and nothing is left beside it.
    """
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        # A failed write knows no name, and a user wants to know which file it was.
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)
