import pytest
import torch

from dfkd_fast.engine.batch_size import largest_batch_size


@pytest.mark.parametrize(("fits", "expected"), [(1, 0), (2, 2), (100, 64), (64, 64), (10**9, 1 << 14)])
def test_the_largest_power_of_2_that_fits_is_returned(fits: int, expected: int) -> None:
    tried: list[int] = []

    def attempt(size: int) -> None:
        tried.append(size)
        if size > fits:
            raise torch.OutOfMemoryError

    assert largest_batch_size(attempt) == expected
    assert len(tried) == len(set(tried))


@pytest.mark.parametrize(("smallest", "first"), [(2, 2), (3, 4), (48, 64), (64, 64)])
def test_no_batch_below_the_minimum_is_tried(smallest: int, first: int) -> None:
    tried: list[int] = []
    largest_batch_size(tried.append, smallest)
    assert tried[0] == first


def test_other_errors_propagate_from_the_batch_size_search() -> None:
    def attempt(size: int) -> None:
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        largest_batch_size(attempt)


@pytest.mark.parametrize("message", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"])
def test_out_of_memory_errors_outside_of_the_allocator_end_the_search(message: str) -> None:
    def attempt(size: int) -> None:
        if size > 8:
            raise RuntimeError(message)

    assert largest_batch_size(attempt) == 8
