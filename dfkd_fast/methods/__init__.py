"""The three axes of a data-free distillation method: objective, replay and update."""

import warnings
from typing import Any

from .batch import Batch, Part
from .objective import Objective, bn_moments_norm
from .replay import (
    POLICIES,
    BankSettings,
    EmaGenerator,
    EmaGeneratorSettings,
    MemoryBank,
    Policy,
    Replay,
    ReplaySource,
    VaeReplay,
    VaeSettings,
    build_replay_source,
    register,
)
from .update import Update

__all__ = [
    "POLICIES",
    "BankSettings",
    "Batch",
    "EmaGenerator",
    "EmaGeneratorSettings",
    "MemoryBank",
    "Objective",
    "Part",
    "Policy",
    "Replay",
    "ReplaySource",
    "Update",
    "VaeReplay",
    "VaeSettings",
    "bn_moments_norm",
    "build_replay_source",
    "register",
]

FORMER_NAMES = {"Memory": "ReplaySource", "build_memory": "build_replay_source"}
"""Public names of version 0.1.0 and their current names."""


def __getattr__(name: str) -> Any:
    if (current := FORMER_NAMES.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.{name} is now called {current}", FutureWarning, stacklevel=2)
    return globals()[current]
