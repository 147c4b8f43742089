"""Data sets, for evaluation and for training teachers. Nothing of the distillation loop imports this."""

from .dali import DaliBatches
from .files import read_listing
from .folder import FolderBatches
from .listing import Listing
from .preprocessing import view_of
from .settings import DATA_SETS, Batches, DataSettings
from .splits import ArraySplit, Augment, PixelSplit, batches
from .table import evaluation_batches, label_names, open_split, palette
from .view import Interpolation, View

__all__ = [
    "DATA_SETS",
    "ArraySplit",
    "Augment",
    "Batches",
    "DaliBatches",
    "DataSettings",
    "FolderBatches",
    "Interpolation",
    "Listing",
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
