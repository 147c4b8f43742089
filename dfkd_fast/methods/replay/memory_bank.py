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
    """Number of epochs or iterations between stored batches."""
    every_unit: Literal["epochs", "iterations"] = "epochs"
    """Unit of ``every``."""
    draw: Literal["batch", "samples"] = "batch"
    """What a student step replays: one stored ``batch`` of ``replay.rows`` samples (MB-DFKD), or ``replay.rows`` ``samples`` drawn
    independently from all stored ones, as from the pool of CMI (arXiv 2105.08584). Stored batches are whole fresh batches then."""
    storage: Literal["float32", "half", "uint8"] = "half"
    """Data type in which the images are stored."""
    cached_logits: Flag = False
    """Store the teacher's logits with the images instead of recomputing them."""

    @override
    def check(self, rows: int, batch_size: int) -> None:
        if self.draw == "batch" and rows > batch_size:
            raise ValueError(
                f"replay.rows = {rows}: must be at most loop.batch_size = {batch_size}; a bank stores rows of a fresh batch,"
                " and replays more of them only with replay.memory_bank.draw = 'samples'"
            )

    @override
    def build(self, rows: int, generator: nn.Module, teacher: nn.Module, images: Tensor, logits: Tensor) -> ReplaySource:
        samples = rows if self.draw == "samples" else 0
        stored = len(images) if samples else rows
        return MemoryBank(
            images[:1].expand(stored, -1, -1, -1),
            logits[:1].expand(stored, *logits.shape[1:]),
            slots=self.slots,
            every=self.every,
            every_unit=self.every_unit,
            samples=samples,
            storage=self.storage,
            cached_logits=self.cached_logits,
        )


class MemoryBank(ReplaySource):
    """Ring buffer of generated batches on the device (MB-DFKD, WACV 2022).

    At the end of every ``every``-th epoch or iteration, the first B rows of the last fresh batch replace the oldest stored batch. A
    student step replays one stored batch, drawn uniformly, or samples drawn independently and uniformly from all stored ones. Nothing
    is replayed while the bank is empty.

    Args:
        images: Example (B, C, H, W) of a stored batch that determines shape and device.
        logits: Example of the teacher's logits for it, (B, classes) or (B, classes, H, W).
        slots: Capacity in batches.
        every: Number of epochs or iterations between stored batches.
        every_unit: Unit of ``every``.
        samples: Number of samples replayed per student step; 0 replays one stored batch.
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
        every_unit: Literal["epochs", "iterations"] = "epochs",
        samples: int = 0,
        storage: Literal["float32", "half", "uint8"] = "half",
        cached_logits: bool = False,
    ) -> None:
        self.rows = samples or len(images)
        self.every, self.every_unit = every, every_unit
        self.stored = 0
        """Total number of batches stored so far."""
        channels, device = images.shape[1], images.device
        self.images = torch.zeros(slots, *images.shape, device=device, dtype=DTYPES[storage])
        self.minimum = torch.zeros(slots, channels, 1, 1, device=device)
        self.scale = torch.zeros(slots, channels, 1, 1, device=device)
        self.logits = torch.zeros(slots, *logits.shape, device=device, dtype=logits.dtype) if cached_logits else None
        # Tensors on the device, so that a captured graph replays batches stored after its capture.
        self._choices = torch.zeros(1, dtype=torch.long, device=device)
        self._drawn = torch.zeros(samples or 1, dtype=torch.long, device=device)
        self._offsets = torch.arange(1 if samples else len(images), device=device)

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
        first = self._drawn.random_(generator=stream).remainder_(self._choices) * len(self._offsets)
        sample = first + self._offsets  # one of the two has a single element
        stored = self.images.flatten(0, 1).index_select(0, sample)
        if stored.dtype == torch.uint8:
            slot = sample // self.images.shape[1]
            images.copy_(stored.float() * self.scale.index_select(0, slot) + self.minimum.index_select(0, slot))
        else:
            images.copy_(stored)
        return None if self.logits is None else self.logits.flatten(0, 1).index_select(0, sample)

    @override
    def end_epoch(self, epoch: int, fresh: Batch) -> None:
        if self.every_unit == "epochs" and epoch % self.every == 0:
            self.store(fresh.images, fresh.teacher_logits)

    @override
    def end_iteration(self, iteration: int, fresh: Batch) -> None:
        if self.every_unit == "iterations" and iteration % self.every == 0:
            self.store(fresh.images, fresh.teacher_logits)

    def store(self, images: Tensor, logits: Tensor) -> None:
        """Replaces the oldest stored batch by the first B rows of a batch.

        Args:
            images: Images (≥ B, C, H, W).
            logits: The teacher's logits for them, (≥ B, classes) or (≥ B, classes, H, W).
        """
        slot, rows = self.stored % len(self.images), self.images.shape[1]
        images, logits = images[:rows], logits[:rows]
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
        rows = self.images.shape[1] // len(self._offsets)  # of a choice
        self._choices.fill_(min(stored, len(self.images)) * rows)

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
