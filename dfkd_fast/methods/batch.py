"""What the student learns from in one step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

__all__ = ["Batch", "Part"]


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
    """The fresh rows first, then the replayed ones, if there are any."""

    def split(self) -> list["Batch"]:
        """A batch of each part."""
        rows = [part.rows for part in self.parts]
        halves = zip(self.images.split(rows), self.teacher_logits.split(rows), self.parts, strict=True)
        return [Batch(images, logits, [part]) for images, logits, part in halves]
