"""What the student learns from in one step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
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
    """(ΣB_i, classes) or (ΣB_i, classes, H, W), without a graph."""
    parts: Sequence[Part]
    """The fresh rows first, then the replayed ones, if there are any."""

    def chunks(self, count: int) -> Iterator["Batch"]:
        """As many batches with some rows of every part, weighted so that their losses add up to the whole's."""
        if count == 1:
            yield self
            return
        for number in range(count):
            rows: list[Tensor] = []
            parts = []
            begin = 0
            for part in self.parts:
                first, last = part.rows * number // count, part.rows * (number + 1) // count
                rows.append(torch.arange(begin + first, begin + last, device=self.images.device))
                parts.append(Part(last - first, part.weight * (last - first) / part.rows))
                begin += part.rows
            chosen = torch.cat(rows)
            # Indexing would lose the layout.
            layout = torch.channels_last if self.images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
            yield Batch(self.images[chosen].contiguous(memory_format=layout), self.teacher_logits[chosen], parts)

    def split(self) -> list["Batch"]:
        """A batch of each part."""
        rows = [part.rows for part in self.parts]
        halves = zip(self.images.split(rows), self.teacher_logits.split(rows), self.parts, strict=True)
        return [Batch(images, logits, [part]) for images, logits, part in halves]
