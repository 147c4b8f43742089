"""MB-DFKD's replay: a ring of stored batches."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from dfkd_fast.settings import Flag, PositiveInt

from ..batch import Batch
from .policy import Policy, ReplaySource
from .section import register

__all__ = ["BankSettings", "MemoryBank"]

DTYPES = {"float32": torch.float32, "half": torch.float16, "uint8": torch.uint8}


@register("memory_bank")
class BankSettings(Policy):
    """Recipe section ``[replay.memory_bank]`` (MB-DFKD, WACV 2022)."""

    slots: PositiveInt = 10
    """Batches it holds."""
    every: PositiveInt = 5
    """Epochs between two stored batches."""
    storage: Literal["float32", "half", "uint8"] = "half"
    """Of the images."""
    cached_logits: Flag = False
    """Keep the teacher's logits with the images, in place of asking it again."""

    @override
    def check(self, rows: int, batch_size: int) -> None:
        if rows > batch_size:
            raise ValueError(f"replay.rows = {rows}: a bank stores rows of a fresh batch, of which there are {batch_size}")

    @override
    def build(self, rows: int, generator: nn.Module, teacher: nn.Module, images: Tensor, logits: Tensor) -> ReplaySource:
        example, answers = images[:1].expand(rows, -1, -1, -1), logits[:1].expand(rows, *logits.shape[1:])
        return MemoryBank(example, answers, slots=self.slots, every=self.every, storage=self.storage, cached_logits=self.cached_logits)


class MemoryBank(ReplaySource):
    """A ring of stored synthetic batches on the device (MB-DFKD, WACV 2022).

    Now and then the first rows of the last fresh batch are stored over the oldest; a student step replays one stored
    batch, drawn uniformly. While it is empty nothing is replayed.

    Args:
        images: a batch like those it will hold, (rows, C, H, W): shape and device are taken from it.
        logits: the teacher's for it, likewise.
        slots: how many batches it holds.
        every: epochs between two stored batches.
        storage: of the images. ``uint8`` keeps 256 levels between the least and the largest value of each channel.
        cached_logits: keep the teacher's logits, in place of asking it again.
    """

    per_rank = stores_fresh = True

    def __init__(
        self,
        images: Tensor,
        logits: Tensor,
        *,
        slots: int,
        every: int,
        storage: Literal["float32", "half", "uint8"] = "half",
        cached_logits: bool = False,
    ) -> None:
        self.rows = len(images)
        self.every = every
        self.stored = 0
        """Batches ever stored."""
        channels, device = images.shape[1], images.device
        self.images = torch.zeros(slots, *images.shape, device=device, dtype=DTYPES[storage])
        self.lowest = torch.zeros(slots, channels, 1, 1, device=device)
        self.step = torch.zeros(slots, channels, 1, 1, device=device)
        self.logits = torch.zeros(slots, *logits.shape, device=device, dtype=logits.dtype) if cached_logits else None
        # Both are read on the device, so that a captured step sees what was stored after its capture.
        self._filled = torch.zeros(1, dtype=torch.long, device=device)
        self._slot = torch.zeros(1, dtype=torch.long, device=device)

    @property
    @override
    def ready(self) -> bool:
        return self.stored > 0

    @override
    @contextmanager
    def assumed_ready(self) -> Iterator[None]:
        stored = self.stored
        self._count(max(stored, 1))
        try:
            yield
        finally:
            self._count(stored)

    @override
    def recall(self, images: Tensor, stream: torch.Generator) -> Tensor | None:
        slot = self._slot.random_(generator=stream).remainder_(self._filled)
        stored = self.images.index_select(0, slot)[0]
        if stored.dtype == torch.uint8:
            images.copy_(stored.float() * self.step.index_select(0, slot)[0] + self.lowest.index_select(0, slot)[0])
        else:
            images.copy_(stored)
        return None if self.logits is None else self.logits.index_select(0, slot)[0]

    @override
    def end_epoch(self, epoch: int, fresh: Batch) -> None:
        if epoch % self.every == 0:
            self.store(fresh.images[: self.rows], fresh.teacher_logits[: self.rows])

    def store(self, images: Tensor, logits: Tensor) -> None:
        """Put a batch in the place of the oldest."""
        slot = self.stored % len(self.images)
        if self.images.dtype == torch.uint8:
            lowest, highest = images.amin((0, 2, 3))[:, None, None], images.amax((0, 2, 3))[:, None, None]
            step = ((highest - lowest) / 255).clamp(min=torch.finfo(torch.float32).tiny)
            self.lowest[slot], self.step[slot] = lowest, step
            images = ((images - lowest) / step).round()
        self.images[slot] = images
        if self.logits is not None:
            self.logits[slot] = logits
        self._count(self.stored + 1)

    def _count(self, stored: int) -> None:
        self.stored = stored
        self._filled.fill_(min(stored, len(self.images)))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images, "lowest": self.lowest, "step": self.step, "logits": self.logits, "stored": self.stored}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        if (state["images"].shape, state["images"].dtype) != (self.images.shape, self.images.dtype):
            raise ValueError(f"a memory bank of {tuple(state['images'].shape)} {state['images'].dtype} is not this one")
        self.images.copy_(state["images"])
        self.lowest.copy_(state["lowest"])
        self.step.copy_(state["step"])
        if self.logits is not None:
            self.logits.copy_(state["logits"])
        self._count(state["stored"])
