"""How well a student retains over the epochs what it acquires (PRE-DFKD, arXiv 2201.03019, reports μ and S²)."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Retention", "retention"]


@dataclass(frozen=True)
class Retention:
    """Statistics of a student's accuracy over its epochs, in percent (the variance in percent²)."""

    last: float
    best: float
    mean: float
    variance: float


def retention(accuracies: Sequence[float]) -> Retention:
    """The statistics of a curve of accuracies in percent; the variance is the population's.

    Raises:
        ValueError: an empty curve.
    """
    if not accuracies:
        raise ValueError("no accuracies: the student was never evaluated")
    return Retention(
        last=accuracies[-1],
        best=max(accuracies),
        mean=statistics.fmean(accuracies),
        variance=statistics.pvariance(accuracies),
    )
