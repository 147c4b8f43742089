"""The largest batch that a GPU's memory takes."""

import gc
from collections.abc import Callable

import torch

__all__ = ["largest_batch_size"]


def largest_batch_size(attempt: Callable[[int], object], limit: int = 1 << 14) -> int:
    """The largest power of 2 with which an attempt does not run out of memory; 0 if even a batch of 2 does.

    Args:
        attempt: takes the steps of an iteration with such a batch; every other error passes through.
        limit: no larger one is tried.
    """
    best, size = 0, 2
    while size <= limit:
        try:
            attempt(size)
        except torch.OutOfMemoryError:
            break
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        best, size = size, 2 * size
    return best
