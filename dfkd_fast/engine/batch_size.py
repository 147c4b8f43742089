"""Search for the largest batch size that fits into GPU memory."""

import gc
from collections.abc import Callable

import torch

from dfkd_fast.out_of_memory import is_out_of_memory

__all__ = ["largest_batch_size"]


def largest_batch_size(attempt: Callable[[int], object], min_size: int = 2, max_size: int = 1 << 14) -> int:
    """Returns the largest power of 2 for which an attempt does not run out of memory; 0 if the smallest one does.

    Args:
        attempt: Runs the steps of an iteration with a batch size. Exceptions other than out-of-memory errors propagate.
        min_size: Minimum batch size, rounded up to a power of 2.
        max_size: Maximum batch size.
    """
    best, size = 0, 1 << (min_size - 1).bit_length()
    while size <= max_size:
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
