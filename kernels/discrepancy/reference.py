"""The discrepancies in plain PyTorch: the oracle of every faster backend."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

HUGE = 1e30  # a log-ratio's finite size where a probability of 0, which multiplies it, makes it infinite


def l1_discrepancy(student: Tensor, teacher: Tensor, reduction: str) -> Tensor:
    return _reduce((_wide(student) - _wide(teacher)).abs(), reduction)


def kl_discrepancy(student: Tensor, teacher: Tensor, temperature: float, reduction: str, scale_by_temperature_squared: bool) -> Tensor:
    log_q, log_p = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    p = log_p.exp()
    log_ratio = (log_p - log_q).masked_fill(p == 0, -HUGE)
    divergence = _reduce(p * log_ratio, reduction)
    return divergence * temperature**2 if scale_by_temperature_squared else divergence


def js_discrepancy(student: Tensor, teacher: Tensor, temperature: float, reduction: str, scale_by_temperature_squared: bool) -> Tensor:
    log_q, log_p = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    q, p = log_q.exp(), log_p.exp()
    log_ratio = (log_p - log_q).masked_fill(q == 0, HUGE).masked_fill(p == 0, -HUGE)
    # log p − log m and log q − log m, where m = (p + q) / 2
    p_ratio, q_ratio = (math.log(2) + F.logsigmoid(ratio) for ratio in (log_ratio, -log_ratio))
    divergence = _reduce((p * p_ratio + q * q_ratio) / 2, reduction)
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
