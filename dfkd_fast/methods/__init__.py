"""The three axes every method is a point on: objective, replay and update."""

from .objective import Objective
from .replay import EmaGenerator, Replay
from .update import Batch, Part, Update

__all__ = ["Batch", "EmaGenerator", "Objective", "Part", "Replay", "Update"]
