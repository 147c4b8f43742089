"""Number of kernels that Triton compiles, which determines the duration of a user's first step and of the GPU tests."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from torch import Tensor
from triton.runtime.jit import JITFunction

from dfkd_fast.kernels.bias_act import gpu as bias_act
from dfkd_fast.kernels.concat import gpu as concat
from dfkd_fast.kernels.discrepancy import gpu as discrepancy
from dfkd_fast.kernels.dispatch import interpreting, unavailable_reason
from dfkd_fast.kernels.ema import gpu as ema
from dfkd_fast.kernels.moments import gpu as moments
from dfkd_fast.kernels.norm import gpu as norm
from tests.kernels.specializations import Recorder, collect

pytestmark = pytest.mark.skipif(interpreting(), reason="the interpreter runs in this process")

MAX_KERNELS, MAX_KERNELS_OF_SAMPLE = 1300, 620


def images(batch: int, channels: int, size: int) -> Tensor:
    return torch.empty(batch, channels, size, size, memory_format=torch.channels_last)


def kl(rows: int, classes: int) -> None:
    logits = torch.empty(rows, classes)
    discrepancy.kl_forward(logits, logits, 4.0, 1.0, True, True, True)


def kl_of_pixels(batch: int, size: int) -> None:
    logits = torch.empty(batch, 21, size, size)
    discrepancy.kl_forward(logits, logits, 4.0, 1.0, True, True, True)


def gradients(size: int) -> None:
    grad_unscaled = torch.empty(size)
    discrepancy.scale_gradients(grad_unscaled, grad_unscaled, torch.ones(()), 1.0, 1.0, grad_unscaled.dtype, grad_unscaled.dtype)


def batch_of(generators: int, rows: int, size: int) -> None:
    constants = torch.ones(generators, 3)
    concat.concat_forward([images(rows, 3, size)] * generators, "tanh", constants, constants, torch.float32, True)


def moments_of(batch: int, channels: int, size: int) -> None:
    parts, center = moments.partial_moments(images(batch, channels, size), "none", size)
    moments.combine_moments([parts], [center], None, None, False)
    moments.combine_moments([parts] * (batch + 1), [center] * (batch + 1), None, None, False)


def bias_act_of(batch: int, channels: int, size: int) -> None:
    x, constant = images(batch, channels, size), torch.ones(channels)
    bias_act.bias_act_forward(x, constant, x, "relu")
    bias_act.bias_act_moments_forward(x, constant, x, "relu", size)
    bias_act.bias_act_backward(x, x, constant, x, "relu", constant, constant, constant, 0.5, True)


def norm_of(batch: int, channels: int, size: int) -> None:
    x, one, constants = images(batch, channels, size), torch.ones(channels), torch.ones(5, channels)
    batches = torch.zeros((), dtype=torch.int64)
    norm.batch_norm_constants(one, one, one, one, one, 1e-5)
    parts = torch.ones(2, channels, size)
    norm.batch_norm_statistics(parts, one, one, one, one, one, one, batches, None, 0.1, 1e-5, batch * size**2)
    norm.batch_norm_act_forward(x, constants[:4], x, "relu", 0.0)
    norm.batch_norm_act_sums(x, x, constants[:4], x, "relu", 0.0, size)
    norm.batch_norm_gradients(parts, constants[:4], None, batch * size**2, True)
    norm.batch_norm_act_backward(x, x, constants[:4], constants, x, "relu", 0.0, True)


def average(tensors: int, first: int) -> None:
    averages, sources = ([torch.empty(60)[first:] for _ in range(tensors)] for _ in range(2))
    ema.ema_update_(averages, sources, [], 0.9, None)


# Inputs that occur in one process, and the number of kernels they need.
CALLS: list[tuple[Callable[..., None], Sequence[tuple[int, ...]], int]] = [
    (kl, [(1, 65), (7, 100), (64, 100), (250, 99)], 2),
    (kl_of_pixels, [(1, 33), (2, 35), (16, 67)], 2),
    (gradients, [(1,), (16,), (1000,)], 1),
    (batch_of, [(1, 1, 17), (2, 3, 28), (2, 16, 32), (3, 5, 224)], 1),
    (moments_of, [(1, 64, 8), (6, 128, 4), (2, 512, 1), (16, 256, 14)], 3),
    (bias_act_of, [(2, 64, 8), (6, 128, 4), (128, 256, 7), (16, 256, 14)], 3),
    (norm_of, [(2, 64, 8), (6, 128, 4), (128, 256, 7), (16, 256, 14)], 6),
    (average, [(2, 0), (7, 0), (32, 0), (70, 0), (5, 1)], 1),
]


@pytest.mark.parametrize(("function", "inputs", "kernels"), CALLS, ids=lambda value: getattr(value, "__name__", ""))
def test_inputs_that_differ_in_size_share_kernels(
    function: Callable[..., None], inputs: Sequence[tuple[int, ...]], kernels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()

    def record(kernel: Any, *arguments: Any, **options: Any) -> None:
        recorder.launch(kernel, *arguments, **options)

    monkeypatch.setattr(JITFunction, "run", record)
    for arguments in inputs:
        function(*arguments)
    assert len(recorder.specializations) == kernels


@pytest.mark.skipif(unavailable_reason("numba") is not None, reason="numba computes the results")
def test_gpu_tests_compile_a_bounded_number_of_kernels(exhaustive: bool) -> None:
    assert len(collect(sample=not exhaustive)) <= (MAX_KERNELS if exhaustive else MAX_KERNELS_OF_SAMPLE)
