"""The discrepancies in plain PyTorch: the oracle of every faster backend."""

import torch
from torch import Tensor


def l1_discrepancy(student: Tensor, teacher: Tensor, reduction: str) -> Tensor:
    return _reduce((_wide(student) - _wide(teacher)).abs(), reduction)


def kl_discrepancy(student: Tensor, teacher: Tensor, temperature: float, reduction: str, scale_by_temperature_squared: bool) -> Tensor:
    log_q = (_wide(student) / temperature).log_softmax(dim=1)
    log_p = (_wide(teacher) / temperature).log_softmax(dim=1)
    divergence = _reduce(log_p.exp() * (log_p - log_q), reduction)
    return divergence * temperature**2 if scale_by_temperature_squared else divergence


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _reduce(elements: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return elements.mean()
    total = elements.sum()
    return total / len(elements) if reduction == "batchmean" else total
