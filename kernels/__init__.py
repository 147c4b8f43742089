"""Operations of data-free distillation that other trainers can import.

One folder an operation: ``__init__.py`` is the public function, checks its arguments and registers its operators;
``reference.py`` is the mathematics in plain PyTorch; ``cpu.py`` (numba) and ``gpu.py`` (Triton) are its kernels, and
csrc/ has them in CUDA. ``dispatch.py`` says which of them serves a call. ``norm`` has no kernel in CUDA, and ``conv`` none
for a GPU; what their kernels do not serve is left to PyTorch.
Nothing here knows the rest of the project, only tensors.
"""

from .concat import concat_generated
from .conv import winograd_conv2d, winograd_is_faster
from .discrepancy import js_discrepancy, kl_discrepancy, l1_discrepancy
from .dispatch import Backend, BackendError, use_backend
from .ema import ema_multi_avg_fn, ema_update_
from .ema.fused import FusedEMA
from .moments import channel_moments, channel_sums
from .norm import batch_norm_leaky_relu

__all__ = [
    "Backend",
    "BackendError",
    "FusedEMA",
    "batch_norm_leaky_relu",
    "channel_moments",
    "channel_sums",
    "concat_generated",
    "ema_multi_avg_fn",
    "ema_update_",
    "js_discrepancy",
    "kl_discrepancy",
    "l1_discrepancy",
    "use_backend",
    "winograd_conv2d",
    "winograd_is_faster",
]
