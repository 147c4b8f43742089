"""Metrics of one epoch."""

from dataclasses import dataclass, field

__all__ = ["Epoch"]


@dataclass(frozen=True)
class Epoch:
    """Metrics of one epoch."""

    number: int
    """Number of the epoch, from 1."""
    seconds: float
    """Duration of the student steps, the generator steps and the evaluation in seconds; in the first epoch, also of what comes before
    its steps, the generator's pretraining and the calibration of a quantized student."""
    losses: dict[str, float]
    """Mean over the epoch of each loss by name: the student's loss and the terms of the generator's loss."""
    student_accuracy: float | None
    """Value returned by ``evaluate``, in percent; None if the epoch was not evaluated."""
    unaveraged_accuracy: float | None = None
    """Accuracy in percent of the student itself if ``loop.student_ema_decay`` is set, where :attr:`student_accuracy` is that of its
    exponential moving average."""
    agreement: float | None = None
    """Percentage of generated samples on which student and teacher predict the same class
    (:func:`dfkd_fast.engine.agreement.agreement`); None if it was not measured."""
    drift: dict[str, float] = field(default_factory=dict)
    """Jensen–Shannon divergence by generator between the student's predictions on samples of this and of the previous epoch; empty
    if ``loop.drift_samples`` is 0."""
    relative_bn_moments: float | None = None
    """Distance between the batch statistics of generated samples and the teacher's running statistics, relative to the norm of the
    latter: 0 if they are equal, 1 for activations that are all 0. None if ``objective.bn_moments`` is 0."""
