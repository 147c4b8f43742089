"""Replay of MB-DFKD: a ring buffer of stored batches."""

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
    """Capacity of the bank in batches."""
    every: PositiveInt = 5
    """Number of epochs between stored batches."""
    storage: Literal["float32", "half", "uint8"] = "half"
    """Data type in which the images are stored."""
    cached_logits: Flag = False
    """Store the teacher's logits with the images instead of recomputing them."""

    @override
    def check(self, rows: int, batch_size: int) -> None:
        if rows > batch_size:
            raise ValueError(f"replay.rows = {rows}: must be at most loop.batch_size = {batch_size}; a bank stores rows of a fresh batch")

    @override
    def build(self, rows: int, generator: nn.Module, teacher: nn.Module, images: Tensor, logits: Tensor) -> ReplaySource:
        images, logits = images[:1].expand(rows, -1, -1, -1), logits[:1].expand(rows, *logits.shape[1:])
        return MemoryBank(images, logits, slots=self.slots, every=self.every, storage=self.storage, cached_logits=self.cached_logits)


class MemoryBank(ReplaySource):
    """Ring buffer of generated batches on the device (MB-DFKD, WACV 2022).

    At the end of every ``every``-th epoch, the first rows of the last fresh batch replace the oldest stored batch. A student step
    replays one stored batch, drawn uniformly. Nothing is replayed while the bank is empty.

    Args:
        images: Example batch (rows, C, H, W) that determines shape and device.
        logits: Example of the teacher's logits for it, (rows, classes) or (rows, classes, H, W).
        slots: Capacity in batches.
        every: Number of epochs between stored batches.
        storage: Data type of the stored images. ``uint8`` quantizes to 256 levels between the minimum and the maximum of each channel.
        cached_logits: Store the teacher's logits instead of recomputing them.
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
        """Total number of batches stored so far."""
        channels, device = images.shape[1], images.device
        self.images = torch.zeros(slots, *images.shape, device=device, dtype=DTYPES[storage])
        self.minimum = torch.zeros(slots, channels, 1, 1, device=device)
        self.scale = torch.zeros(slots, channels, 1, 1, device=device)
        self.logits = torch.zeros(slots, *logits.shape, device=device, dtype=logits.dtype) if cached_logits else None
        # Tensors on the device, so that a captured graph replays batches stored after its capture.
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
        self._set_stored(max(stored, 1))
        try:
            yield
        finally:
            self._set_stored(stored)

    @override
    def recall(self, images: Tensor, stream: torch.Generator) -> Tensor | None:
        slot = self._slot.random_(generator=stream).remainder_(self._filled)
        stored = self.images.index_select(0, slot)[0]
        if stored.dtype == torch.uint8:
            images.copy_(stored.float() * self.scale.index_select(0, slot)[0] + self.minimum.index_select(0, slot)[0])
        else:
            images.copy_(stored)
        return None if self.logits is None else self.logits.index_select(0, slot)[0]

    @override
    def end_epoch(self, epoch: int, fresh: Batch) -> None:
        if epoch % self.every == 0:
            self.store(fresh.images[: self.rows], fresh.teacher_logits[: self.rows])

    def store(self, images: Tensor, logits: Tensor) -> None:
        """Replaces the oldest stored batch.

        Args:
            images: Images (rows, C, H, W).
            logits: The teacher's logits for them, (rows, classes) or (rows, classes, H, W).
        """
        slot = self.stored % len(self.images)
        if self.images.dtype == torch.uint8:
            minimum, maximum = images.amin((0, 2, 3))[:, None, None], images.amax((0, 2, 3))[:, None, None]
            scale = ((maximum - minimum) / 255).clamp(min=torch.finfo(torch.float32).tiny)
            self.minimum[slot], self.scale[slot] = minimum, scale
            images = ((images - minimum) / scale).round()
        self.images[slot] = images
        if self.logits is not None:
            self.logits[slot] = logits
        self._set_stored(self.stored + 1)

    def _set_stored(self, stored: int) -> None:
        self.stored = stored
        self._filled.fill_(min(stored, len(self.images)))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images, "lowest": self.minimum, "step": self.scale, "logits": self.logits, "stored": self.stored}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        if (state["images"].shape, state["images"].dtype) != (self.images.shape, self.images.dtype):
            expected, actual = (f"{tuple(images.shape)} {images.dtype}" for images in (self.images, state["images"]))
            raise ValueError(f"the state holds a memory bank of {actual}, expected {expected}")
        self.images.copy_(state["images"])
        self.minimum.copy_(state["lowest"])
        self.scale.copy_(state["step"])
        if self.logits is not None:
            self.logits.copy_(state["logits"])
        self._set_stored(state["stored"])
