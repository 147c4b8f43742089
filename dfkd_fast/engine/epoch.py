"""What one epoch came to."""

from dataclasses import dataclass, field

__all__ = ["Epoch"]


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to."""

    number: int
    """From 1."""
    seconds: float
    """Of its student steps, generator steps and evaluation."""
    losses: dict[str, float]
    """Means over the epoch: the student's loss, and the generator's terms by name."""
    student_accuracy: float | None
    """What ``evaluate`` returned, in percent; None where it was not asked."""
    unaveraged_accuracy: float | None = None
    """The same of the student itself, where ``loop.student_ema_decay`` makes its average what is kept."""
    drift: dict[str, float] = field(default_factory=dict)
    """How far the student's predictions moved with the generators since the epoch before, where ``loop.drift_samples`` asks."""
