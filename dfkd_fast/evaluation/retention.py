"""Stability of a student's accuracy over the epochs; PRE-DFKD (arXiv 2201.03019) reports its mean μ and variance S²."""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Retention", "retention"]


@dataclass(frozen=True)
class Retention:
    """Statistics of a student's accuracy over the evaluated epochs, in percent; variances in percent²."""

    last: float
    best: float
    mean: float
    variance: float
    settled_mean: float
    """Mean over the last three quarters of the epochs, without the initial rise, which dominates the variance of every method."""
    settled_variance: float
    """Variance over the last three quarters of the epochs."""
    largest_drop: float
    """Largest difference between the best accuracy so far and the accuracy of an epoch, in points; 0 if accuracy never falls."""
    threshold: float
    """Accuracy threshold of ``fraction_retained``."""
    fraction_retained: float
    """Fraction of the epochs with an accuracy of at least ``threshold``, in [0, 1]."""


def retention(accuracies: Sequence[float], threshold: float) -> Retention:
    """Returns the statistics of a student's accuracies; variances are population variances.

    Args:
        accuracies: accuracy of every evaluated epoch, in percent.
        threshold: threshold of ``fraction_retained``, in percent.

    Raises:
        ValueError: ``accuracies`` is empty.
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
