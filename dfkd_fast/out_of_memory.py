"""Recognizes out-of-memory errors and turns them into one line."""

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
"""Parts of messages: only some allocators raise a type of their own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that GPU or host memory is exhausted, or that a size exceeds any memory."""
    # By name, because this module is imported without PyTorch.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, ImportError | RuntimeError | ValueError | TypeError) and any(sign in str(error) for sign in SIGNS)


def sizes_of(recipe: object, *paths: str) -> dict[str, object]:
    """Returns the values of settings by dotted path, such as loop.batch_size."""
    return {path: attrgetter(path)(recipe) for path in paths}


@contextmanager
def memory_for(what: str, sizes: Mapping[str, object]) -> Iterator[None]:
    """Replace out-of-memory exceptions from inside by one with a one-line message.

    Args:
        what: what the memory is for, such as "the steps".
        sizes: settings that it depends on, by dotted path.

    Raises:
        OutOfMemoryError: instead of the allocator's exception.
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


def one_line_message(error: BaseException, purpose: str = "", advice: str = "use smaller sizes") -> str:
    """Returns one line for an out-of-memory exception, with the size of the failed allocation if the allocator reports it."""
    match = re.search(r"allocate ([\d.]+) (\w+)", str(error))
    amount = f", {_readable(*match.groups())} at once" if match else ""
    return f"out of memory{purpose}{amount}: {advice}"


def _readable(number: str, unit: str) -> str:
    return f"{int(number) / 2**30:,.1f} GiB" if unit == "bytes" else f"{number} {unit}"
