"""Data sets, for evaluation and for training teachers. Nothing of the distillation loop imports this."""

from .dali import DaliBatches
from .eval_transform import EvalTransform, Interpolation
from .files import read_listing
from .folder import FolderBatches
from .image_lists import ImageList
from .preprocessing import eval_transform_of
from .settings import DATA_SETS, Batches, DataSettings
from .splits import ArraySplit, Augment, SegmentationDataset, batches
from .table import evaluation_batches, label_names, open_split, palette

__all__ = [
    "DATA_SETS",
    "ArraySplit",
    "Augment",
    "Batches",
    "DaliBatches",
    "DataSettings",
    "EvalTransform",
    "FolderBatches",
    "ImageList",
    "Interpolation",
    "SegmentationDataset",
    "batches",
    "eval_transform_of",
    "evaluation_batches",
    "label_names",
    "open_split",
    "palette",
    "read_listing",
]
