"""Data-free knowledge distillation: a frozen teacher's knowledge in a small student, without any data."""

from .engine import Engine, Epoch, Loop, Method, Optimizer, Trainer
from .errors import DfkdError, NonFiniteLossError
from .methods import Objective, Replay, Update
from .models import GeneratorA, GeneratorB
from .recipe import Recipe, load_recipe

__version__ = "0.1.0"

__all__ = [
    "DfkdError",
    "Engine",
    "Epoch",
    "GeneratorA",
    "GeneratorB",
    "Loop",
    "Method",
    "NonFiniteLossError",
    "Objective",
    "Optimizer",
    "Recipe",
    "Replay",
    "Trainer",
    "Update",
    "__version__",
    "load_recipe",
]
