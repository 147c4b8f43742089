"""What a network is worth on data it has never seen, and how steadily it got there."""

from .accuracy import Agreement, Evaluation, Figures, evaluate, top1_accuracy
from .drift import Drift
from .retention import Retention, retention

__all__ = ["Agreement", "Drift", "Evaluation", "Figures", "Retention", "evaluate", "retention", "top1_accuracy"]
