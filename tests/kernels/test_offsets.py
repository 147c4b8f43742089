"""Offsets beyond 2³¹ elements. On a CPU, the memory between the elements is never written and takes no physical memory."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dfkd_fast.kernels import Backend, channel_sums, concat_generated, js_discrepancy, kl_discrepancy, l1_discrepancy, use_backend
from dfkd_fast.kernels.dispatch import unavailable_reason
from tests.kernels.oracles import assert_as_accurate_as_pytorch, bias_act_moments

FAR = 1 << 31
NUMBA: Any = "numba"
SUM: dict[str, Any] = {"temperature": 2.0, "reduction": "sum", "scale_by_temperature_squared": True}
DISCREPANCIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": lambda s, t: l1_discrepancy(s, t, reduction="sum"),
    "kl": lambda s, t: kl_discrepancy(s, t, **SUM),
    "js": lambda s, t: js_discrepancy(s, t, **SUM),
}
NAMES = [*DISCREPANCIES, "moments", "bias_act", "concat"]


def alone_with_numba(test: Callable[[], None]) -> Callable[[], None]:
    return pytest.mark.alone(pytest.mark.skipif(unavailable_reason("numba") is not None, reason="numba is not installed")(test))


def zeros(elements: int) -> Tensor:
    """Return bfloat16 zeros in lazily allocated pages."""
    try:
        return torch.from_numpy(np.zeros(elements, np.int16)).view(torch.bfloat16)
    except MemoryError:
        pytest.skip("4 GiB of virtual memory cannot be allocated")


@alone_with_numba
def test_batch_strides_may_exceed_31_bits() -> None:
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


@alone_with_numba
def test_channel_strides_may_exceed_31_bits() -> None:
    raw = zeros(FAR + 120).as_strided((2, 2, 4, 5), (20, FAR, 5, 1))
    raw.copy_(torch.randn(raw.shape))
    with use_backend(NUMBA):
        assert torch.equal(concat_generated([raw], activation="none", normalize="none"), raw)


@alone_with_numba
def test_the_last_elements_of_large_tensors_are_read() -> None:
    classes = 1 << 16
    student, teacher = (zeros(FAR + classes).view(-1, classes) for _ in range(2))
    student[-1, 5], teacher[-1, -1] = 3, -2
    with use_backend(NUMBA):
        assert l1_discrepancy(student, teacher, reduction="sum").item() == 5
        total, square_total, count = channel_sums(student.view(len(student), 2, 1 << 7, 1 << 8))
        assert total.tolist() == pytest.approx([3.0, 0.0], rel=1e-12)
        assert square_total.tolist() == pytest.approx([9.0, 0.0], rel=1e-12)
        assert count == student.numel() // 2
        alone: dict[str, Any] = {"temperature": 1.0, "reduction": "sum", "scale_by_temperature_squared": False}
        divergence = kl_discrepancy(student, teacher, **alone)  # equal rows contribute exactly 0
        assert torch.equal(divergence, kl_discrepancy(student[-1:], teacher[-1:], **alone))
    assert divergence > 0


def check_the_last_image(name: str, images: int, device: torch.device | str) -> None:
    """Compare the results for the last image with those for this image alone; all others are 0."""
    student, teacher = (torch.zeros(images, 256, 16, 16, dtype=torch.bfloat16, device=device) for _ in range(2))
    for side in (student, teacher):
        side[-1].copy_(torch.randn(side.shape[1:]))
    last = [side[-1:].clone().requires_grad_() for side in (student, teacher)]
    match name:
        case "concat":
            batch = concat_generated([student], activation="tanh", normalize="none", memory_format=torch.contiguous_format)
            assert torch.equal(batch[-1:], concat_generated([last[0].detach()], activation="tanh", normalize="none"))
        case "moments":
            x, sums = last[0].detach(), channel_sums(student)[:2]
            for index, power in enumerate((1, 2)):
                exact, plain = ((x.to(dtype) ** power).sum(dim=(0, 2, 3)) for dtype in (torch.float64, torch.float32))
                size = (x.float().abs() ** power).sum(dim=(0, 2, 3)).max().item()
                assert_as_accurate_as_pytorch(sums[index], plain.double(), exact, magnitude=size)
            (gradient,) = torch.autograd.grad(channel_sums(student.requires_grad_())[1].sum(), student)
            torch.testing.assert_close(gradient[-1:], 2 * x)
        case "bias_act":
            bias, sides, gradients = torch.ones(256, device=device), ((student.requires_grad_(), teacher), last), []
            for x, residual in sides:
                y, mean, _ = bias_act_moments(x, bias, residual.detach(), "silu")
                gradients += [y[-1:], *(part[-1:] for part in torch.autograd.grad((y, mean), x, (residual, torch.zeros_like(mean))))]
            assert torch.equal(gradients[0], gradients[2])
            assert torch.equal(gradients[1], gradients[3])
        case _:
            loss, alone = (DISCREPANCIES[name](*sides) for sides in ((student.requires_grad_(), teacher.requires_grad_()), last))
            torch.testing.assert_close(loss, alone, rtol=1e-4, atol=0)
            expected = torch.autograd.grad(alone, last)
            for gradient, usual in zip(torch.autograd.grad(loss, (student, teacher)), expected, strict=True):
                torch.testing.assert_close(gradient[-1:], usual)


@pytest.mark.parametrize("name", NAMES)
def test_the_last_of_a_few_images_is_processed(fused: Backend, device: torch.device, name: str) -> None:
    check_the_last_image(name, 3, device)


@pytest.fixture
def gpu_memory() -> Iterator[int]:
    """Free GPU memory in GiB; the cache is emptied afterwards."""
    torch.cuda.empty_cache()
    yield torch.cuda.mem_get_info()[0] >> 30
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize("name", NAMES)
def test_the_last_of_very_many_images_is_processed(gpu_backend: Backend, gpu_memory: int, name: str) -> None:
    if gpu_memory < 48:
        pytest.skip(f"takes 48 GiB of GPU memory, of which {gpu_memory} are free")
    check_the_last_image(name, (FAR >> 16) + 1, "cuda")
