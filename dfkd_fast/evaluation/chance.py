"""Accuracy at chance level."""

from dfkd_fast.data import DataSettings

__all__ = ["chance", "is_at_chance"]


def chance(data: DataSettings) -> float:
    """Accuracy of guesses in percent; of a segmenter, the most that one class for every pixel can have as mIoU."""
    return 100 / data.num_classes


def is_at_chance(accuracy: float, data: DataSettings) -> bool:
    """Whether a network's accuracy, or mIoU, in percent, is one that luck alone can give."""
    guessed = chance(data)
    return accuracy <= (guessed if data.task == "segmentation" else min(1.5 * guessed, guessed + 5))
