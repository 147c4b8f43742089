"""Chance level of accuracy and mIoU."""

from dfkd_fast.data import DataSettings

__all__ = ["chance", "is_at_chance"]


def chance(data: DataSettings) -> float:
    """Returns the accuracy of random guesses in percent; for segmentation, the largest mIoU of a constant prediction."""
    return 100 / data.num_classes


def is_at_chance(accuracy: float, data: DataSettings) -> bool:
    """Returns True if an accuracy or mIoU in percent is not clearly above chance level.

    The threshold is the chance level for segmentation; for classification, it is 1.5 times the chance level, at most 5 points above.
    """
    level = chance(data)
    return accuracy <= (level if data.task == "segmentation" else min(1.5 * level, level + 5))
