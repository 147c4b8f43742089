"""Optimisers and their schedules, from settings."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn
from torch.optim import lr_scheduler

from dfkd_fast.settings import Fraction, NonNegative, Positive, PositiveInt, settings

__all__ = ["Optimizer", "build_optimizer", "build_schedule"]


@settings
class Optimizer:
    """Recipe sections ``[student_optimizer]``, ``[generator_optimizer]`` and ``[teacher_optimizer]``."""

    kind: Literal["sgd", "adam"] = "sgd"
    lr: Positive = 0.1
    momentum: Fraction = 0.9
    """Of ``sgd``, without Nesterov's form."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Of ``adam``."""
    weight_decay: NonNegative = 0.0
    schedule: Literal["constant", "cosine", "multistep"] = "constant"
    """Of the learning rate, by epoch: ``cosine`` falls to 0 at the end, ``multistep`` by ``gamma`` at ``milestones``."""
    milestones: tuple[PositiveInt, ...] = ()
    gamma: Positive = 0.1


def build_optimizer(wanted: Optimizer, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser the settings describe, over these parameters."""
    if wanted.kind == "adam":
        return torch.optim.Adam(parameters, lr=wanted.lr, betas=wanted.betas, weight_decay=wanted.weight_decay)
    return torch.optim.SGD(parameters, lr=wanted.lr, momentum=wanted.momentum, weight_decay=wanted.weight_decay)


def build_schedule(wanted: Optimizer, optimizer: torch.optim.Optimizer, epochs: int) -> lr_scheduler.LRScheduler:
    """The schedule of its learning rate, to be stepped after every epoch."""
    if wanted.schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    milestones = list(wanted.milestones) if wanted.schedule == "multistep" else []
    return lr_scheduler.MultiStepLR(optimizer, milestones, wanted.gamma)
