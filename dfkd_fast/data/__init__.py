"""Data sets, for evaluation and for training teachers. Nothing of the distillation loop imports this."""

from .sets import DataSettings, open_split
from .splits import ArraySplit, Augment, batches

__all__ = ["ArraySplit", "Augment", "DataSettings", "batches", "open_split"]
