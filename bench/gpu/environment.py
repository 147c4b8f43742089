"""Stage 1: the host's hardware and versions, and two upper bounds: copy bandwidth and the rate of a large matrix product."""

import os
import platform
import statistics
from collections.abc import Callable
from typing import cast

import torch

from dfkd_fast.kernels import Backend, channel_moments, dispatch, use_backend
from dfkd_fast.kernels.build import BuildError, compile_extension
from dfkd_fast.kernels.dispatch import backends
from dfkd_fast.kernels.extension import BINARY

from .. import provenance
from ..micro import timing
from ..micro.workload import Trial
from .context import Context

__all__ = ["run"]

PACKAGES = ("torch", "triton", "torchvision", "timm", "numba", "numpy", "pydantic", "pytest", "pytest-xdist")
SIDE, TOY_SIDE = 8192, 256
PRODUCTS = 9


def run(context: Context) -> None:
    """Record versions, copy bandwidth (bytes read + written per second), the rate of a bfloat16 matrix product, and each backend."""
    steps: dict[str, Callable[[str, Context], None]] = {
        "versions": _versions,
        "copy bandwidth": _copy,
        "bf16 product": _product,
        "triton": _backend,
        "cuda": _backend,
    }
    for name in context.cases(steps):
        with context.attempt(name):
            steps[name](name, context)


def _versions(case: str, context: Context) -> None:
    versions = {name: provenance.version(name) for name in PACKAGES}
    host = {**_gpu(context.device), "cores": os.cpu_count(), "python": platform.python_version(), "cuda": torch.version.cuda, **versions}
    context.record(case, text=", ".join(f"{name} {value}" for name, value in host.items()), table="host", row=host, highlight=True)


def _copy(case: str, context: Context) -> None:
    bandwidth = timing.copy_bandwidth(timing.timer_for(context.device), context.device) / 1e9
    row = {"gb_per_s": bandwidth, "bytes": timing.COPIED_BYTES[context.device.type]}
    context.record(case, text=f"a large copy moves {bandwidth:.0f} GB/s", table="ceilings", row=row, highlight=True)


def _product(case: str, context: Context) -> None:
    """Record the median rate of the product of two random square matrices."""
    side = TOY_SIDE if context.rehearse else SIDE
    left, right = (torch.randn(side, side, device=context.device, dtype=torch.bfloat16) for _ in range(2))
    trial = Trial(lambda _: left @ right, dict, torch.no_grad)
    rate = 2 * side**3 / statistics.median(timing.timer_for(context.device)(trial, PRODUCTS, True)) / 1e12
    row = {"tflops": rate, "side": side}
    context.record(case, text=f"a bf16 matrix product of size {side}: {rate:.3g} TFLOP/s", table="ceilings", row=row, highlight=True)


def _backend(case: str, context: Context) -> None:
    """Record whether a backend is available and runs; one that was compiled for other GPUs can be loaded, but not run."""
    backend = cast(Backend, case)
    if (reason := _reason(context, backend)) is not None:
        context.record(case, "failed", reason)
        return
    x = torch.arange(24.0, device=context.device).reshape(2, 3, 2, 2)
    if backend in backends(context.device):  # an extension that was just compiled is not registered yet
        with use_backend(backend):
            mean, _ = channel_moments(x)
        torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    context.record(case, text="available")


def _gpu(device: torch.device) -> dict[str, object]:
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cudnn": torch.backends.cudnn.version(),
        "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
        "conv_tf32": torch.backends.cudnn.allow_tf32,
    }


def _reason(context: Context, backend: Backend) -> str | None:
    """Return why a backend is not available on the device, or None. Compiles the CUDA extension if it is missing."""
    if context.rehearse:
        from . import rehearsal

        return rehearsal.unavailable_reason(backend)
    reason = dispatch.unavailable_reason(backend)
    if backend == "cuda" and reason is not None and not BINARY.is_file():
        try:
            compile_extension(BINARY, architectures=[_gencode(context.device)])
        except BuildError as error:
            return f"{reason}; and {str(error).splitlines()[0]}"
        torch.ops.load_library(str(BINARY))
        return None
    return reason


def _gencode(device: torch.device) -> str:
    number = "".join(map(str, torch.cuda.get_device_capability(device)))
    return f"-gencode=arch=compute_{number},code=sm_{number}"
