"""Elements that lie more than 2³¹ elements from the first are found. The memory between them is never written, so that it takes no room."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dfkd_fast.kernels import channel_sums, concat_generated, kl_discrepancy, l1_discrepancy, use_backend
from dfkd_fast.kernels.dispatch import why_not

pytestmark = pytest.mark.skipif(why_not("numba") is not None, reason="numba is not installed")

FAR = 1 << 31
NUMBA: Any = "numba"


def zeros(elements: int) -> Tensor:
    """bfloat16 zeros that the operating system provides page by page."""
    try:
        return torch.from_numpy(np.zeros(elements, np.int16)).view(torch.bfloat16)
    except MemoryError:
        pytest.skip("the operating system gives out no 4 GiB that are not used")


def test_images_may_be_far_apart_in_inputs_batches_and_gradients() -> None:
    shape, strides = (2, 3, 4, 5), (FAR + 60, 20, 5, 1)
    raw, out, gradient = (zeros(FAR + 120).as_strided(shape, strides) for _ in range(3))
    raw.copy_(torch.randn(shape))
    gradient.copy_(torch.randn(shape))
    with use_backend(NUMBA):
        near = concat_generated([raw.contiguous()], activation="tanh", normalize="none")
        concat_generated([raw], activation="tanh", normalize="none", out=out)
        assert torch.equal(out, near)
        leaf = raw.detach().requires_grad_()
        (slope,) = torch.autograd.grad(concat_generated([leaf], activation="tanh", normalize="none"), leaf, gradient)
    expected = gradient.float() * (1 - raw.float().tanh().square())
    torch.testing.assert_close(slope.float(), expected, rtol=0.01, atol=0.01)


def test_channels_may_be_far_apart() -> None:
    raw = zeros(FAR + 120).as_strided((2, 2, 4, 5), (20, FAR, 5, 1))
    raw.copy_(torch.randn(raw.shape))
    with use_backend(NUMBA):
        assert torch.equal(concat_generated([raw], activation="none", normalize="none"), raw)


def test_the_last_of_very_many_elements_count() -> None:
    classes = 1 << 16
    student, teacher = (zeros(FAR + classes).view(-1, classes) for _ in range(2))
    student[-1, 5], teacher[-1, -1] = 3, -2
    with use_backend(NUMBA):
        assert l1_discrepancy(student, teacher, reduction="sum").item() == 5
        total, square_total, count = channel_sums(student.view(len(student), 2, 1 << 7, 1 << 8))
        assert (total.tolist(), square_total.tolist()) == ([3.0, 0.0], [9.0, 0.0])
        assert count == student.numel() // 2
        alone: dict[str, Any] = {"temperature": 1.0, "reduction": "sum", "scale_by_temperature_squared": False}
        divergence = kl_discrepancy(student, teacher, **alone)  # equal rows have none, exactly
        assert torch.equal(divergence, kl_discrepancy(student[-1:], teacher[-1:], **alone))
    assert divergence > 0
