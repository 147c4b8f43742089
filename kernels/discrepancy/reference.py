"""Discrepancies in plain PyTorch: the reference for the other backends."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

HUGE = 1e30  # finite substitute for an infinite log ratio whose factor is a probability of 0


def discrepancy(kind: Literal["l1", "kl", "js"], student: Tensor, teacher: Tensor, temperature: float | None, reduction: str) -> Tensor:
    """Return the loss without the factor temperature²; L1 has no temperature."""
    student, teacher = _wide(student), _wide(teacher)
    if temperature is not None:
        student, teacher = ((logits / temperature).log_softmax(dim=1) for logits in (student, teacher))
    elements = {"l1": _l1, "kl": _kl, "js": _js}[kind](student, teacher)
    if reduction == "mean":
        return elements.mean()
    total = elements.sum()
    return total / len(elements) if reduction == "batchmean" else total


def agreement(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.argmax(dim=1) == teacher.argmax(dim=1)).sum()


def _l1(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).abs()


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    p = log_p.exp()
    return p * (log_p - log_q).masked_fill(p == 0, -HUGE)


def _js(log_q: Tensor, log_p: Tensor) -> Tensor:
    q, p = log_q.exp(), log_p.exp()
    log_ratio = (log_p - log_q).masked_fill(q == 0, HUGE).masked_fill(p == 0, -HUGE)
    # log p − log m and log q − log m, where m = (p + q) / 2
    p_ratio, q_ratio = (math.log(2) + F.logsigmoid(ratio) for ratio in (log_ratio, -log_ratio))
    return (p * p_ratio + q * q_ratio) / 2


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
