"""Fused operations for data-free knowledge distillation, usable from any training loop.

Each subpackage is one operation: ``__init__.py`` has the public function, which checks its arguments and registers the
operators; ``reference.py`` is the implementation in plain PyTorch; ``cpu.py`` (numba) and ``gpu.py`` (Triton) are the kernels,
and csrc/ has them in CUDA C++. ``dispatch.py`` chooses the backend of a call. ``conv`` calls cuDNN on a GPU. Calls of ``norm`` and
``conv`` that their kernels do not support run on PyTorch's own operators.

The package depends on PyTorch only, not on the rest of dfkd_fast.
"""

from typing import TYPE_CHECKING, Any

from .bias_act import bias_act
from .concat import concat_generated
from .conv import conv2d_relu, winograd_conv2d, winograd_is_faster
from .discrepancy import js_discrepancy, kl_discrepancy, l1_discrepancy
from .dispatch import Backend, BackendError, use_backend
from .ema import ema_multi_avg_fn, ema_update_
from .ema.fused import FusedEMA
from .moments import PartialMoments, channel_moments, channel_sums, combine_moments, partial_moments
from .norm import batch_norm_act
from .norm import batch_norm_leaky_relu as batch_norm_leaky_relu  # an earlier name
from .renamed import current_name

__all__ = [
    "Backend",
    "BackendError",
    "FusedEMA",
    "PartialMoments",
    "batch_norm_act",
    "bias_act",
    "channel_moments",
    "channel_sums",
    "combine_moments",
    "concat_generated",
    "conv2d_relu",
    "ema_multi_avg_fn",
    "ema_update_",
    "js_discrepancy",
    "kl_discrepancy",
    "l1_discrepancy",
    "partial_moments",
    "use_backend",
    "winograd_conv2d",
    "winograd_is_faster",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        return globals()[current_name(__name__, name)]
