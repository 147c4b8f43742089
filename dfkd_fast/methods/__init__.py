"""The three axes every method is a point on: objective, replay and update."""

from .batch import Batch, Part
from .objective import Objective
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
    "build_replay_source",
    "register",
]
