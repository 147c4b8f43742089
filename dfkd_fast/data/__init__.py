"""Data sets for evaluation and for teacher training. The distillation loop does not import this package."""

from .dali import DaliBatches
from .eval_transform import EvalTransform, Interpolation
from .files import list_test_images
from .folder import FolderBatches
from .image_lists import ImageList
from .preprocessing import resolve_eval_transform
from .settings import DATA_SETS, Batches, DataSettings
from .splits import ArraySplit, Augment, SegmentationDataset, batches
from .table import class_names, evaluation_batches, open_split, palette

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
    "class_names",
    "evaluation_batches",
    "list_test_images",
    "open_split",
    "palette",
    "resolve_eval_transform",
]
