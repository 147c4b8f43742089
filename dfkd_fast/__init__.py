"""Data-free knowledge distillation: distills a frozen teacher into a small student without any data."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import kernels
    from .engine import Engine, Epoch, Loop, Method, Optimizer, Trainer, within_budget
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
    "kernels",
    "load_recipe",
    "within_budget",
]

# Imported at first use: PyTorch takes seconds, which neither --help nor a single kernel should cost.
MODULES = {
    "engine": ("Engine", "Epoch", "Loop", "Method", "Optimizer", "Trainer", "within_budget"),
    "errors": ("DfkdError", "NonFiniteLossError"),
    "methods": ("Objective", "Replay", "Update"),
    "models": ("GeneratorA", "GeneratorB"),
    "recipe": ("Recipe", "load_recipe"),
}
"""Public names by the module that defines them."""


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return importlib.import_module(".kernels", __name__)
    for module, names in MODULES.items():
        if name in names:
            value = getattr(importlib.import_module(f".{module}", __name__), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
