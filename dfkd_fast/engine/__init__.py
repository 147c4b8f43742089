"""Training engine: the student step, the generator step and the trainer that alternates them."""

from .budget import within_budget
from .epoch import Epoch
from .method import Engine, Loop, Method
from .optim import Optimizer
from .trainer import Trainer

__all__ = ["Engine", "Epoch", "Loop", "Method", "Optimizer", "Trainer", "within_budget"]
