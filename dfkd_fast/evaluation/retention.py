"""How well a student retains over the epochs what it acquires (PRE-DFKD, arXiv 2201.03019, reports μ and S²)."""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Retention", "retention"]


@dataclass(frozen=True)
class Retention:
    """Statistics of a student's accuracy over its evaluated epochs, in percent (variances in percent²)."""

    last: float
    best: float
    mean: float
    variance: float
    settled_mean: float
    """Over the last three quarters of the epochs: the first rise, which no method is spared, is most of the whole variance."""
    settled_variance: float
    largest_drop: float
    """From a previous peak, in points; 0 for a curve that never falls."""
    threshold: float
    """An accuracy."""
    fraction_retained: float
    """Of the epochs, in [0, 1], those at or above the threshold."""


def retention(accuracies: Sequence[float], threshold: float) -> Retention:
    """The statistics of a curve of accuracies in percent; variances are the population's.

    Raises:
        ValueError: an empty curve.
    """
    if not accuracies:
        raise ValueError("no accuracies: the student was never evaluated")
    settled = accuracies[len(accuracies) // 4 :]
    peaks = itertools.accumulate(accuracies, max)
    return Retention(
        last=accuracies[-1],
        best=max(accuracies),
        mean=statistics.fmean(accuracies),
        variance=statistics.pvariance(accuracies),
        settled_mean=statistics.fmean(settled),
        settled_variance=statistics.pvariance(settled),
        largest_drop=max(peak - accuracy for peak, accuracy in zip(peaks, accuracies, strict=True)),
        threshold=threshold,
        fraction_retained=sum(accuracy >= threshold for accuracy in accuracies) / len(accuracies),
    )
