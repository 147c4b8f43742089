"""The discrepancies in plain PyTorch: the oracle of every faster backend."""

import math

import torch
from torch import Tensor


def l1_discrepancy(student: Tensor, teacher: Tensor, reduction: str) -> Tensor:
    return _reduce((_wide(student) - _wide(teacher)).abs(), reduction)


def kl_discrepancy(student: Tensor, teacher: Tensor, temperature: float, reduction: str, scale_by_temperature_squared: bool) -> Tensor:
    log_q, log_p = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    divergence = _reduce(log_p.exp() * (log_p - log_q), reduction)
    return divergence * temperature**2 if scale_by_temperature_squared else divergence


def js_discrepancy(student: Tensor, teacher: Tensor, temperature: float, reduction: str, scale_by_temperature_squared: bool) -> Tensor:
    log_q, log_p = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    divergence = _reduce((log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)) / 2, reduction)
    return divergence * temperature**2 if scale_by_temperature_squared else divergence


def agreement(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.argmax(dim=1) == teacher.argmax(dim=1)).sum()


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return (_wide(logits) / temperature).log_softmax(dim=1)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _reduce(elements: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return elements.mean()
    total = elements.sum()
    return total / len(elements) if reduction == "batchmean" else total
