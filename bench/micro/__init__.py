"""Micro-benchmarks of the kernels against eager PyTorch, torch.compile and other libraries.

``workload.py`` defines cases; ``ema.py``, ``discrepancy.py``, ``concat.py``, ``moments.py``, ``bias_act.py``, ``conv.py`` and ``norm.py``
have the cases of each kernel, the eager implementations and other libraries; ``check.py`` compares results with a float64 reference,
``timing.py`` measures times, ``runner.py`` combines them, ``rows.py`` writes and prints the results.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from dfkd_fast.errors import DfkdError

from . import bias_act, concat, conv, discrepancy, ema, moments, norm
from .workload import Mode, Workload

__all__ = ["KERNELS", "PROVIDERS", "Case", "select"]

PROVIDERS = (
    *("eager", "compile", "reference", "numba", "triton", "cuda"),
    *("fused_ema", "averaged_model", "model_ema_v3", "foreach_lerp", "flat_lerp", "apex", "liger"),
)


class Kernel(NamedTuple):
    """Benchmark cases of a kernel."""

    sizes: Sequence[str]
    workloads: Callable[[str, str], Sequence[Workload]]
    """Maps the kernel's name and a size to workloads; empty if the size is invalid for this kernel."""
    example: str


def _kernel(module: Any) -> Kernel:
    return Kernel(module.SIZES, module.workloads, module.EXAMPLE)


KERNELS = {
    "ema": _kernel(ema),
    "l1": _kernel(discrepancy),
    "kl": _kernel(discrepancy),
    "js": _kernel(discrepancy),
    "concat": _kernel(concat),
    "moments": _kernel(moments),
    "bias_act": _kernel(bias_act),
    "conv": _kernel(conv),
    "norm": _kernel(norm),
}


class Case(NamedTuple):
    """Key of a workload in a mode; unlike a workload, it can be pickled."""

    kernel: str
    variant: str
    size: str
    dtype: torch.dtype
    layout: str
    mode: Mode

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return " ".join(filter(None, (self.kernel, self.variant, self.size, dtype, self.layout, self.mode)))

    def workload(self) -> Workload:
        """Return the workload of this case.

        Raises:
            DfkdError: the case does not exist.
        """
        for one in KERNELS[self.kernel].workloads(self.kernel, self.size):
            if (one.variant, one.dtype, one.layout) == (self.variant, self.dtype, self.layout) and self.mode in one.modes:
                return one
        raise DfkdError(f"{self} is not a case of {self.kernel}")


def select(kernels: Sequence[str], sizes: Sequence[str], everything: bool) -> list[Workload]:
    """Return the workloads of kernels.

    Args:
        kernels: names of the kernels.
        sizes: sizes to benchmark; if empty, the default sizes.
        everything: all default sizes, dtypes and layouts instead of a few common ones.

    Raises:
        DfkdError: a size is valid for none of the kernels.
    """
    for size in sizes:
        if not any(KERNELS[name].workloads(name, size) for name in kernels):
            allowed = "; ".join(f"{name}: {KERNELS[name].example}" for name in kernels)
            raise DfkdError(f"--size {size!r}: must be a size of a chosen kernel ({allowed})")
    return [
        workload
        for name in kernels
        for size in sizes or KERNELS[name].sizes
        for workload in KERNELS[name].workloads(name, size)
        if sizes or everything or workload.quick
    ]
