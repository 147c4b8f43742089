"""The loop: one student step, one generator step, and the trainer that alternates them."""

from .method import Loop, Method
from .optim import Optimizer
from .trainer import Epoch, Trainer

__all__ = ["Epoch", "Loop", "Method", "Optimizer", "Trainer"]
