"""The training batch of a student step: fresh and replayed samples with the teacher's logits."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Batch", "Part"]


class Part(NamedTuple):
    """Consecutive rows of a batch that share a weight in the student's loss."""

    rows: int
    """Number of rows."""
    weight: float
    """Weight of the discrepancy over these rows."""


@dataclass(frozen=True)
class Batch:
    """Training batch of a student step."""

    images: Tensor
    """Images (ΣB_i, C, H, W), detached."""
    teacher_logits: Tensor
    """Teacher logits (ΣB_i, classes) or (ΣB_i, classes, H, W), detached."""
    parts: Sequence[Part]
    """Fresh rows, followed by the replayed rows if there are any."""
    teacher_features: Tensor | None = None
    """Feature vectors of the teacher for the rows of the first parts, (≤ ΣB_i, D), detached; None if they are not compared."""

    @property
    def feature_parts(self) -> Sequence[Part]:
        """Parts whose rows have feature vectors."""
        if self.teacher_features is None:
            return []
        ends = list(accumulate(part.rows for part in self.parts))
        return self.parts[: bisect_right(ends, len(self.teacher_features))]

    def chunks(self, count: int) -> Iterator["Batch"]:
        """Yields ``count`` micro-batches with rows of every part, weighted so that their losses sum to the loss of this batch."""
        if count == 1:
            yield self
            return
        for number in range(count):
            rows: list[Tensor] = []
            parts = []
            offset = 0
            for part in self.parts:
                start, end = part.rows * number // count, part.rows * (number + 1) // count
                rows.append(torch.arange(offset + start, offset + end, device=self.images.device))
                parts.append(Part(end - start, part.weight * (end - start) / part.rows))
                offset += part.rows
            indices = torch.cat(rows)
            # Indexing does not preserve the memory format.
            layout = torch.channels_last if self.images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
            features = self.teacher_features
            if features is not None:
                features = features[torch.cat(rows[: len(self.feature_parts)])]
            yield Batch(self.images[indices].contiguous(memory_format=layout), self.teacher_logits[indices], parts, features)

    def split(self) -> list["Batch"]:
        """Returns one batch per part."""
        rows = [part.rows for part in self.parts]
        features: list[Tensor | None] = [None] * len(rows)
        if self.teacher_features is not None:
            covered = rows[: len(self.feature_parts)]
            features[: len(covered)] = self.teacher_features.split(covered)
        slices = zip(self.images.split(rows), self.teacher_logits.split(rows), self.parts, features, strict=True)
        return [Batch(images, logits, [part], vectors) for images, logits, part, vectors in slices]
