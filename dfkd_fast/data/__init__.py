"""Data sets, for evaluation and for training teachers. Nothing of the distillation loop imports this."""

from .dali import DaliBatches
from .folder import FolderBatches
from .listing import CLASSES, Listing, read_listing
from .preprocessing import view_of
from .sets import Batches, DataSettings, Loader, evaluation_batches, label_names, open_split, palette
from .splits import ArraySplit, Augment, PixelSplit, batches
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
    "PixelSplit",
    "View",
    "batches",
    "evaluation_batches",
    "label_names",
    "open_split",
    "palette",
    "read_listing",
    "view_of",
]
