"""Bias, residual and activation in plain PyTorch: the reference for the other backends."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..moments import reference as moments

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
}


def bias_act(x: Tensor, bias: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    shifted = _shifted(x, bias)
    return ACTIVATIONS[activation](shifted if residual is None else shifted + residual).to(x.dtype)


def bias_act_moments(x: Tensor, bias: Tensor, residual: Tensor | None, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    return bias_act(x, bias, residual, activation), *moments.partial_moments(_shifted(x, bias))


def _shifted(x: Tensor, bias: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return wide + bias.to(wide.dtype)[:, None, None]
