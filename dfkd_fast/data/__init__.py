"""Data sets, for evaluation and for training teachers. Nothing of the distillation loop imports this."""

from .dali import DaliBatches
from .folder import FolderBatches
from .listing import CLASSES, Listing, read_listing
from .preprocessing import view_of
from .sets import Batches, DataSettings, Loader, evaluation_batches, open_split
from .splits import ArraySplit, Augment, batches
from .view import Interpolation, View

__all__ = [
    "CLASSES",
    "ArraySplit",
    "Augment",
    "Batches",
    "DaliBatches",
    "DataSettings",
    "FolderBatches",
    "Interpolation",
    "Listing",
    "Loader",
    "View",
    "batches",
    "evaluation_batches",
    "open_split",
    "read_listing",
    "view_of",
]
