"""Evaluation: accuracy, segmentation metrics, agreement between networks, and retention over the training."""

from .accuracy import ClassificationMetrics, evaluate, top1_accuracy
from .chance import chance, is_at_chance
from .evaluator import Evaluator, check_readable, iou_by_class
from .passes import Agreement, Evaluation
from .retention import Retention, retention
from .segmentation import SegmentationMetrics, evaluate_segmentation, mean_iou

__all__ = [
    "Agreement",
    "ClassificationMetrics",
    "Evaluation",
    "Evaluator",
    "Retention",
    "SegmentationMetrics",
    "chance",
    "check_readable",
    "evaluate",
    "evaluate_segmentation",
    "iou_by_class",
    "is_at_chance",
    "mean_iou",
    "retention",
    "top1_accuracy",
]
