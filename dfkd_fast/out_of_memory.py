"""What running out of memory looks like, and the line that a user gets for it."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter

from .errors import OutOfMemoryError

__all__ = ["is_out_of_memory", "memory_for", "one_line_message", "sizes_of"]

SIGNS = (
    "out of memory",
    "ALLOC_FAILED",  # cuBLAS, cuDNN
    "can't allocate memory",
    "bad_alloc",
    "failed to map segment",  # a library's, where a limit is set
    "array is too big",  # NumPy
    "size calculation overflowed",
    "multiplication overflow",
    "Overflow when unpacking long",
)
"""In messages: only some allocators have a type of their own for it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory is short, on the GPU or the host, or that a size is beyond any memory."""
    # By name, for this file is imported where PyTorch is not.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, ImportError | RuntimeError | ValueError | TypeError) and any(sign in str(error) for sign in SIGNS)


def sizes_of(recipe: object, *paths: str) -> dict[str, object]:
    """Settings by dotted path, such as loop.batch_size."""
    return {path: attrgetter(path)(recipe) for path in paths}


@contextmanager
def memory_for(what: str, sizes: Mapping[str, object]) -> Iterator[None]:
    """Let running out of memory inside be one line.

    Args:
        what: what the memory is for, such as "the first steps".
        sizes: the settings that it depends on, by dotted path.

    Raises:
        OutOfMemoryError: instead of whatever the allocator raised.
    """
    try:
        yield
    except OutOfMemoryError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        settings = ", ".join(f"{path} = {value}" for path, value in sizes.items())
        raise OutOfMemoryError(one_line_message(error, f" for {what}", f"lower one of {settings}")) from error


def one_line_message(error: BaseException, purpose: str = "", advice: str = "lower the sizes that were asked for") -> str:
    """A line for an error that :func:`is_out_of_memory` knows, with the amount where the allocator tells it."""
    found = re.search(r"allocate ([\d.]+) (\w+)", str(error))
    amount = f", {_readable(*found.groups())} at once" if found else ""
    return f"out of memory{purpose}{amount}: {advice}"


def _readable(number: str, unit: str) -> str:
    return f"{int(number) / 2**30:,.1f} GiB" if unit == "bytes" else f"{number} {unit}"
