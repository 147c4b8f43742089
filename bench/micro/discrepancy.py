"""Discrepancies between the logits of a student and a teacher: L1, KL and JS.

Variants: "both" sides require a gradient, as in the generator's step; or only the "student", as in the student's step.

Minimum memory traffic: both logits are read once and each gradient is written once. The forward pass can compute the gradients up to
the upstream factor, so that "full" has the same minimum as "backward". Implementations that save less than the logits (int8 signs
for L1) can be below the minimum of "backward".
"""

from collections.abc import Callable
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_fast.kernels import js_discrepancy, kl_discrepancy, l1_discrepancy

from .workload import DTYPES, LAYOUTS, FunctionWorkload, Provider, parse_shape

__all__ = ["EXAMPLE", "SIZES", "workloads"]

SEGMENTATION = "64x11x128x128"
SIZES = (*(f"{rows}x{classes}" for classes in (10, 100, 365, 1000) for rows in (128, 256, 512, 1024, 4096)), SEGMENTATION)
QUICK = {"l1": ("256x10", "256x1000"), "kl": ("256x10", "256x1000"), "js": ("256x1000",)}
EXAMPLE = "NxC or NxCxHxW, such as 256x1000"
TEMPERATURE = 4.0


def workloads(kernel: str, size: str) -> list[FunctionWorkload]:
    """Return all cases of a size (N, C) or (N, C, H, W); empty if the size is invalid."""
    shape = parse_shape(size, 2, 4)
    if shape is None:
        return []
    layouts = LAYOUTS if len(shape) == 4 else ("contiguous",)
    variants = ("both", "student")
    return [_workload(kernel, variant, size, shape, dtype, layout) for variant in variants for dtype in DTYPES for layout in layouts]


def _workload(kernel: str, variant: str, size: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> FunctionWorkload:
    eager, ours = FUNCTIONS[kernel]
    logits = torch.Size(shape).numel() * dtype.itemsize
    sides = ("student", "teacher") if variant == "both" else ("student",)
    gradient_floor = 2 * logits + len(sides) * logits
    return FunctionWorkload(
        kernel=kernel,
        variant=variant,
        size=size,
        dtype=dtype,
        layout=layout,
        # forward is identical for both variants
        modes=("forward", "backward", "full") if variant == "both" else ("backward", "full"),
        quick=size in QUICK[kernel] and variant == "both" and dtype == torch.float32,
        inputs=partial(_logits, shape, dtype, layout),
        outputs=("loss",),
        floors={"forward": 2 * logits, "backward": gradient_floor, "full": gradient_floor},
        eager=eager,
        ours=ours,
        oracle=eager,
        differentiable=sides,
        peers=(_liger(),) if kernel == "kl" and variant == "student" and len(shape) == 2 else (),
    )


@lru_cache(maxsize=1)
def _logits(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device) -> dict[str, Tensor]:
    random = torch.Generator(device).manual_seed(0)
    made = {side: torch.randn(shape, generator=random, device=device) * TEMPERATURE for side in ("student", "teacher")}
    return {side: logits.to(dtype, memory_format=LAYOUTS[layout] if len(shape) == 4 else None) for side, logits in made.items()}


def _l1(student: Tensor, teacher: Tensor) -> Tensor:
    return F.l1_loss(student, teacher)


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(student / TEMPERATURE, dim=1), F.log_softmax(teacher / TEMPERATURE, dim=1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * TEMPERATURE**2


def _js(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(student / TEMPERATURE, dim=1), F.log_softmax(teacher / TEMPERATURE, dim=1)
    log_m = ((log_p.exp() + log_q.exp()) / 2).log()
    to_p = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
    to_q = F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
    return (to_p + to_q) / 2 * TEMPERATURE**2


def _our_l1(student: Tensor, teacher: Tensor) -> Tensor:
    return l1_discrepancy(student, teacher, reduction="mean")


def _our_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return kl_discrepancy(student, teacher, temperature=TEMPERATURE, reduction="batchmean", scale_by_temperature_squared=True)


def _our_js(student: Tensor, teacher: Tensor) -> Tensor:
    return js_discrepancy(student, teacher, temperature=TEMPERATURE, reduction="batchmean", scale_by_temperature_squared=True)


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "l1": (_l1, _our_l1),
    "kl": (_kl, _our_kl),
    "js": (_js, _our_js),
}


def _liger() -> Provider:
    """Liger's KL divergence, which fuses the loss after log-softmax and has no gradient for the teacher."""
    if find_spec("liger_kernel") is None:
        return Provider("liger", _kl, unavailable="liger-kernel is not installed")
    if not torch.cuda.is_available():
        return Provider("liger", _kl, unavailable="liger-kernel needs a GPU")

    divergence = import_module("liger_kernel.transformers").LigerKLDIVLoss(reduction="batchmean", log_target=True)

    def call(student: Tensor, teacher: Tensor) -> Tensor:
        log_q, log_p = F.log_softmax(student / TEMPERATURE, dim=1), F.log_softmax(teacher / TEMPERATURE, dim=1)
        return divergence(log_q, log_p) * TEMPERATURE**2

    return Provider("liger", call, capturable=False)  # its backward pass reads the upstream gradient on the host
