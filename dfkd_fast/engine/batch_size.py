"""The largest batch that a GPU's memory takes."""

import gc
from collections.abc import Callable

import torch

from dfkd_fast.out_of_memory import is_out_of_memory

__all__ = ["largest_batch_size"]


def largest_batch_size(attempt: Callable[[int], object], smallest: int = 2, limit: int = 1 << 14) -> int:
    """The largest power of 2 with which an attempt does not run out of memory; 0 if even the smallest does.

    Args:
        attempt: takes the steps of an iteration with such a batch; every other error passes through.
        smallest: no smaller one is tried.
        limit: nor a larger one.
    """
    best, size = 0, 1 << (smallest - 1).bit_length()
    while size <= limit:
        try:
            attempt(size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        best, size = size, 2 * size
    return best
