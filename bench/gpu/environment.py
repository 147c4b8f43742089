"""Stage 1: what the host has, and its two ceilings: a large copy and a large matrix product."""

import os
import platform
import statistics

import torch

from dfkd_fast.kernels import Backend, dispatch
from dfkd_fast.kernels.build import BuildError, compile_extension
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
    """Record versions, backends, copy bandwidth (bytes read + written per second) and the rate of a bfloat16 product."""
    versions = {name: provenance.version(name) for name in PACKAGES}
    host = {**_gpu(context.device), "cores": os.cpu_count(), "python": platform.python_version(), "cuda": torch.version.cuda, **versions}
    context.record("versions", text=", ".join(f"{name} {value}" for name, value in host.items()), table="host", row=host, highlight=True)
    backends: tuple[Backend, ...] = ("triton", "cuda")
    for backend in backends:
        with context.attempt(backend):
            reason = _reason(context, backend)
            context.record(backend, "ok" if reason is None else "failed", reason or "available")
    with context.attempt("copy bandwidth"):
        bandwidth = timing.copy_bandwidth(timing.turn_on(context.device), context.device) / 1e9
        row = {"gb_per_s": bandwidth, "bytes": timing.COPIED_BYTES[context.device.type]}
        context.record("copy bandwidth", text=f"a large copy moves {bandwidth:.0f} GB/s", table="ceilings", row=row, highlight=True)
    with context.attempt("bf16 product"):
        rate, side = _product(context)
        row = {"tflops": rate, "side": side}
        context.record("bf16 product", text=f"a bf16 product of side {side}: {rate:.3g} TFLOP/s", table="ceilings", row=row, highlight=True)


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
    """Why a backend cannot serve the device, or None. The extension is compiled here if it was not brought."""
    if context.rehearse:
        from . import rehearsal

        return rehearsal.unavailable_reason(backend)
    reason = dispatch.why_not(backend)
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


def _product(context: Context) -> tuple[float, int]:
    """TFLOP/s of the median product of two square bfloat16 matrices of random numbers, and their side."""
    side = TOY_SIDE if context.rehearse else SIDE
    left, right = (torch.randn(side, side, device=context.device, dtype=torch.bfloat16) for _ in range(2))
    trial = Trial(lambda _: left @ right, dict, torch.no_grad)
    seconds = statistics.median(timing.turn_on(context.device)(trial, PRODUCTS, True))
    return 2 * side**3 / seconds / 1e12, side
