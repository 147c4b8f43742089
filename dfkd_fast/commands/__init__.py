"""What the command line does: distil, teach, evaluate."""

from .distill import distill, fitted, teach
from .evaluate import Evaluated, EvaluatedClassifier, EvaluatedSegmenter, Wanted, evaluate_weights
from .examine import Check, examine_teacher
from .segmentation import print_iou

__all__ = [
    "Check",
    "Evaluated",
    "EvaluatedClassifier",
    "EvaluatedSegmenter",
    "Wanted",
    "distill",
    "evaluate_weights",
    "examine_teacher",
    "fitted",
    "print_iou",
    "teach",
]
