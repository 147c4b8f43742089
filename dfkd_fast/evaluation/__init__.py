"""What a network is worth on data it has never seen, and how steadily it got there."""

from .accuracy import top1_accuracy
from .drift import Drift
from .retention import Retention, retention

__all__ = ["Drift", "Retention", "retention", "top1_accuracy"]
