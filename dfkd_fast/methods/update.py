"""Third axis: how the student's gradient comes from a batch of fresh and replayed samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn

from dfkd_fast.settings import settings

from .objective import Objective

__all__ = ["Batch", "Part", "Update"]


class Part(NamedTuple):
    """So many consecutive rows of a batch, and the weight of their discrepancy in the student's loss."""

    rows: int
    weight: float


@dataclass(frozen=True)
class Batch:
    """What the student learns from in one step."""

    images: Tensor
    """(ΣB_i, C, H, W), without a graph."""
    teacher_logits: Tensor
    """(ΣB_i, classes), without a graph."""
    parts: Sequence[Part]
    """The fresh rows first, then the replayed ones."""


@settings
class Update:
    """Recipe section ``[update]``."""

    kind: Literal["plain"] = "plain"
    """``plain``: one forward of the whole batch, the gradient of the weighted sum."""

    def backward(self, student: nn.Module, batch: Batch, objective: Objective) -> Tensor:
        """Add the gradient of the student's loss to its ``.grad``; returns the loss, 0-d and detached."""
        rows = [part.rows for part in batch.parts]
        halves = zip(student(batch.images).split(rows), batch.teacher_logits.split(rows), batch.parts, strict=True)
        terms = [part.weight * objective.student_loss(logits, targets) for logits, targets, part in halves]
        loss = sum(terms[1:], start=terms[0])
        loss.backward()
        return loss.detach()
