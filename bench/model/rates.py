"""Rates of the GPUs that the model knows."""

from dataclasses import dataclass

__all__ = ["DEVICES", "Rates"]


@dataclass(frozen=True)
class Rates:
    """Rates at which the model lets every kernel run."""

    name: str
    flops: float
    """FLOP/s of convolutions and matrix products in bf16."""
    bandwidth: float
    """Bytes/s of device memory."""
    kernel_seconds: float
    """Shortest time of a kernel in a CUDA graph, from its start to the start of the next one."""


DEVICES = {
    # 474 TFLOP/s: 60 % of a large bf16 matrix product (795 TFLOP/s, docs/gpu.md), which implicit GEMMs of 64 to 512 channels reach.
    # 4.0 TB/s: 95 % of a large copy (4.22 TB/s, docs/gpu.md).
    "h200": Rates("H200", flops=474e12, bandwidth=4.0e12, kernel_seconds=1.7e-6),
    # The same multiprocessors with the memory of the H100 SXM: 3.35 instead of 4.8 TB/s by the data sheets.
    "h100": Rates("H100 SXM", flops=474e12, bandwidth=2.8e12, kernel_seconds=1.7e-6),
}
