"""Micro-benchmarks of the kernels: ours against plain PyTorch, torch.compile and the field's.

``workload.py`` says what a case is; ``ema.py``, ``discrepancy.py``, ``concat.py``, ``moments.py`` and ``layers.py`` have the cases of each
kernel, their textbook forms and their peers; ``check.py`` compares results with a float64 oracle, ``timing.py`` takes the
times, ``runner.py`` puts them together, ``rows.py`` writes and prints them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from dfkd_fast.errors import DfkdError

from . import concat, discrepancy, ema, layers, moments
from .workload import Mode, Workload

__all__ = ["KERNELS", "PROVIDERS", "Case", "select"]

PROVIDERS = (
    *("eager", "compile", "reference", "numba", "triton", "cuda"),
    *("fused_ema", "averaged_model", "model_ema_v3", "foreach_lerp", "flat_lerp", "apex", "liger"),
)


class Kernel(NamedTuple):
    """The cases of a kernel."""

    sizes: Sequence[str]
    workloads: Callable[[str, str], Sequence[Workload]]
    """From the kernel's name and a size; none if it is none of this kernel's."""
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
    "conv": _kernel(layers),
    "norm": _kernel(layers),
}


class Case(NamedTuple):
    """A workload in a mode, by what tells it from all others: unlike a workload, it can be sent to another process."""

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
        """What is measured.

        Raises:
            DfkdError: there is no such case.
        """
        for one in KERNELS[self.kernel].workloads(self.kernel, self.size):
            if (one.variant, one.dtype, one.layout) == (self.variant, self.dtype, self.layout) and self.mode in one.modes:
                return one
        raise DfkdError(f"{self} is not a case of {self.kernel}")


def select(kernels: Sequence[str], sizes: Sequence[str], everything: bool) -> list[Workload]:
    """The workloads of some kernels: of the sizes given, else all, else a few that users have most.

    Raises:
        DfkdError: a size is of none of these kernels.
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
