"""The three axes every method is a point on: objective, replay and update."""

from .batch import Batch, Part
from .objective import Objective
from .replay import (
    POLICIES,
    BankSettings,
    EmaGenerator,
    EmaGeneratorSettings,
    Memory,
    MemoryBank,
    Policy,
    Replay,
    VaeReplay,
    VaeSettings,
    build_memory,
    register,
)
from .update import Update

__all__ = [
    "POLICIES",
    "BankSettings",
    "Batch",
    "EmaGenerator",
    "EmaGeneratorSettings",
    "Memory",
    "MemoryBank",
    "Objective",
    "Part",
    "Policy",
    "Replay",
    "Update",
    "VaeReplay",
    "VaeSettings",
    "build_memory",
    "register",
]
