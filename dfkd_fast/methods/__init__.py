"""The three axes every method is a point on: objective, replay and update."""

from .batch import Batch, Part
from .objective import Objective
from .replay import BankSettings, EmaGenerator, Memory, MemoryBank, Replay, VaeReplay, VaeSettings, build_memory
from .update import Update

__all__ = [
    "BankSettings",
    "Batch",
    "EmaGenerator",
    "Memory",
    "MemoryBank",
    "Objective",
    "Part",
    "Replay",
    "Update",
    "VaeReplay",
    "VaeSettings",
    "build_memory",
]
