"""Host overhead of an EMA update: the time of a call whose kernel is replaced by a no-op.

A CUDA graph's replay avoids it; an eager step waits for it whenever the GPU is faster than the host.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from unittest import mock

import numpy as np
import torch

from dfkd_fast.errors import DfkdError
from dfkd_fast.kernels import FusedEMA, ema_update_, operators
from dfkd_fast.kernels.ema import pairs

from .micro import ema
from .provenance import KERNELS, Provenance, measured_on

__all__ = ["NETWORKS", "Row", "measure"]

NETWORKS = ("resnet18", "resnet50")
CALLS, SAMPLES = 20, 50


@dataclass(frozen=True)
class Row:
    """Host overhead of one call on one network."""

    network: str
    tensors: int
    """Number of parameters and buffers."""
    call: str
    median_us: float
    """Median CPU time of the calling thread, per call, which other processes do not affect."""
    q20_us: float
    q80_us: float
    provenance: Provenance = field(kw_only=True, metadata={"columns": KERNELS})


def measure(networks: Sequence[str], device: torch.device, command: str) -> list[Row]:
    """Time the host overhead of ``FusedEMA.update``, and of ``ema_update_`` on prepared lists; returns a row for each network and call.

    Raises:
        DfkdError: A network's EMA is computed by the backend ``reference``, plain PyTorch, which has no kernel to replace.
    """
    provenance = measured_on(device, command)
    rows = []
    for name in networks:
        network = ema.NETWORKS[name]().to(device)
        averages, sources = ema.tensors(copy.deepcopy(network)), ema.tensors(network)
        if pairs(averages, sources, None).backend == "reference":
            raise DfkdError(f"{name}: its EMA is computed by the backend reference, which has no kernel to replace")
        calls: dict[str, Callable[[], None]] = {
            "FusedEMA.update": partial(FusedEMA(network, ema.DECAY).update, network),
            "ema_update_": partial(ema_update_, averages, sources, ema.DECAY),
        }
        with mock.patch.object(operators, "operator", lambda *_: _no_op):
            for call, function in calls.items():
                q20, median, q80 = np.quantile(_microseconds(function), (0.2, 0.5, 0.8)).round(2).tolist()
                rows.append(Row(name, len(sources), call, median, q20, q80, provenance=provenance))
    return rows


def _no_op(*_: object) -> None:
    """Stands in for a kernel."""


def _microseconds(call: Callable[[], None]) -> list[float]:
    call()  # the first call prepares the lists
    samples = []
    for _ in range(SAMPLES):
        begin = time.thread_time_ns()
        for _ in range(CALLS):
            call()
        samples.append((time.thread_time_ns() - begin) / CALLS / 1e3)
    return samples
