"""Compile the Triton kernels for an H200 on any machine; only launching needs a GPU."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dfkd_fast.kernels.bias_act import gpu as bias_act
from dfkd_fast.kernels.concat import gpu as concat
from dfkd_fast.kernels.discrepancy import gpu as discrepancy
from dfkd_fast.kernels.dispatch import interpreting
from dfkd_fast.kernels.ema import gpu as ema
from dfkd_fast.kernels.moments import gpu as moments
from dfkd_fast.kernels.norm import gpu as norm

pytestmark = pytest.mark.skipif(interpreting(), reason="the interpreter compiles nothing")

DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
CL = torch.channels_last


class _Absent:
    """Driver of a GPU that does not exist, with its own device and compilation cache."""

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> str:
        return "absent"

    def get_current_stream(self, device: str) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Compiled kernels of the launches of a test, by name."""
    kernels: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernels[self.fn.__name__] = run(self, *arguments, grid=grid, warmup=True, **options)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", _Absent())
    return kernels


def empty(*shape: int, dtype: torch.dtype = torch.float32, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.empty(shape, dtype=dtype, memory_format=memory_format)


def half(*shape: int, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return empty(*shape, dtype=torch.bfloat16, memory_format=memory_format)


CONSTANTS, VECTOR, HIDDEN = torch.ones(2, 3), empty(64), half(64, 64, 32, 32, memory_format=CL)
PLANES = empty(64, 64, 32, 32)
CONSTANTS_OF_NORM, BATCHES = empty(4, 64), torch.zeros((), dtype=torch.int64)
# A call, and the minimum numbers of 16-byte loads and stores of its first kernel.
CALLS: dict[str, tuple[Callable[[], object], int, int]] = {
    "l1 of pixels": (lambda: discrepancy.l1_forward(half(8, 11, 64, 64), half(8, 11, 64, 64), 1.0, True, False), 4, 1),
    "l1 of pixels and agreement": (lambda: discrepancy.l1_forward(empty(8, 11, 64, 64), empty(8, 11, 64, 64), 1.0, True, True), 16, 2),
    "kl of few rows": (lambda: discrepancy.kl_forward(empty(512, 10), empty(512, 10), 4.0, 1.0, True, True, True), 0, 0),
    "kl of rows": (lambda: discrepancy.kl_forward(empty(256, 1000), half(256, 1000), 4.0, 1.0, True, True, True), 0, 0),
    "kl of pixels": (lambda: discrepancy.kl_forward(empty(8, 11, 64, 64), empty(8, 11, 64, 64), 4.0, 1.0, True, True, False), 16, 16),
    "js of pixels": (lambda: discrepancy.js_forward(half(8, 21, 64, 64), half(8, 21, 64, 64), 4.0, 1.0, True, True, True), 8, 8),
    "kl of long rows": (lambda: discrepancy.kl_forward(empty(8, 50000), empty(8, 50000), 4.0, 1.0, True, True, True), 12, 4),
    "gradients": (
        lambda: discrepancy.scale_gradients(half(9, 1024), half(9, 1024), torch.ones(()), 1, 1, torch.bfloat16, torch.float16),
        4,
        4,
    ),
    "moments": (lambda: moments.partial_moments(half(64, 64, 56, 56), "none", 16), 2, 0),
    "moments, channels-last": (lambda: moments.partial_moments(empty(64, 64, 56, 56, memory_format=CL), "none", 1024), 4, 0),
    "moments of many layers": (lambda: moments.combine_moments([empty(2, 64, 1024)] * 36, [VECTOR] * 36, None, None, False), 0, 0),
    "backward of the moments": (
        lambda: moments.moments_backward(half(64, 64, 56, 56, memory_format=CL), VECTOR, VECTOR, VECTOR, 0.5),
        2,
        2,
    ),
    "bias and activation": (lambda: bias_act.bias_act_forward(HIDDEN, VECTOR, None, "relu"), 2, 2),
    "bias, residual and activation": (lambda: bias_act.bias_act_forward(PLANES, VECTOR, PLANES, "silu"), 8, 4),
    "bias, activation and moments": (lambda: bias_act.bias_act_moments_forward(HIDDEN, VECTOR, HIDDEN, "relu6", 1024), 4, 2),
    "gradient of bias, activation and moments": (
        lambda: bias_act.bias_act_backward(HIDDEN, HIDDEN, VECTOR, HIDDEN, "hardswish", VECTOR, VECTOR, VECTOR, 0.5, True),
        6,
        4,
    ),
    "norm": (lambda: norm.batch_norm_act_forward(empty(64, 64, 32, 32), CONSTANTS_OF_NORM, None, "leaky_relu", 0.2), 4, 4),
    "norm, residual and activation": (
        lambda: norm.batch_norm_act_forward(HIDDEN, CONSTANTS_OF_NORM, HIDDEN, "relu", 0.0),
        4,
        2,
    ),
    "constants of the norm": (lambda: norm.batch_norm_constants(VECTOR, VECTOR, VECTOR, VECTOR, VECTOR, 1e-5), 0, 0),
    "statistics of the norm": (
        lambda: norm.batch_norm_statistics(
            empty(2, 64, 1024), VECTOR, VECTOR, VECTOR, VECTOR, VECTOR, VECTOR, BATCHES, None, 0.1, 1e-5, 1 << 20
        ),
        0,
        0,
    ),
    "sums of the norm's gradient": (
        lambda: norm.batch_norm_act_sums(HIDDEN, HIDDEN, CONSTANTS_OF_NORM, HIDDEN, "relu", 0.0, 1024),
        6,
        0,
    ),
    "constants of the norm's gradient": (
        lambda: norm.batch_norm_gradients(empty(2, 64, 1024), CONSTANTS_OF_NORM, None, 1 << 20, True),
        0,
        0,
    ),
    "gradient of the norm": (
        lambda: norm.batch_norm_act_backward(HIDDEN, HIDDEN, CONSTANTS_OF_NORM, empty(5, 64), HIDDEN, "relu", 0.0, True),
        6,
        4,
    ),
    "concat": (lambda: concat.concat_forward([half(64, 3, 64, 64)], "tanh", CONSTANTS, CONSTANTS, torch.bfloat16, True), 2, 0),
    "concat, contiguous": (lambda: concat.concat_forward([empty(64, 3, 64, 64)], "tanh", None, None, torch.float32, False), 4, 4),
    "gradient of concat": (
        lambda: concat.concat_backward(half(64, 3, 64, 64, memory_format=CL), half(64, 3, 64, 64), "tanh", *CONSTANTS, *CONSTANTS),
        2,
        2,
    ),
    "statistics of concat": (lambda: concat.concat_gradient_moments(empty(8, 3, 64, 64), half(8, 3, 64, 64), "sigmoid", *CONSTANTS), 4, 0),
    "average of an arena": (lambda: ema.ema_update_([empty(9000)], [half(9000)], [half(9000)], 0.9, torch.tensor(0.9)), 4, 4),
    "average of a list": (lambda: ema.ema_update_([empty(size) for size in range(1, 41)], [empty(40)] * 40, [], 0.9, None), 0, 0),
}


@pytest.mark.parametrize("name", CALLS)
def test_kernels_compile_for_an_h200_with_wide_accesses_and_no_spills(name: str, compiled: dict[str, Any], tmp_path: Path) -> None:
    call, loads, stores = CALLS[name]
    call()
    ptx = next(iter(compiled.values())).asm["ptx"]
    assert len(re.findall(r"ld\.global\.v4\.b32|ld\.global\.v2\.b64", ptx)) >= loads
    assert len(re.findall(r"st\.global\.v4\.b32|st\.global\.v2\.b64", ptx)) >= stores
    for kernel in compiled.values():
        binary = tmp_path / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([DISASSEMBLER, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
        assert "STACK:0" in usage
        assert "LOCAL:0" in usage
