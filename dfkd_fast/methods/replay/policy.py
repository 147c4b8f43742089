"""What every replay policy answers to: its settings, and the memory that they build."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..batch import Batch

__all__ = ["Policy", "ReplaySource"]


class Policy:
    """Settings of a replay policy: a recipe section ``[replay.KIND]``, whose class is decorated with ``@register(KIND)``.

    Every key has a default. A policy overrides what it does otherwise, and :meth:`build`.
    """

    fp16: ClassVar[bool] = True
    """Whether it runs with fp16, where losses are scaled: one that takes backward passes of its own does not."""

    @property
    def smallest_batch(self) -> int:
        """Fresh samples a step that it needs at least, whatever ``replay.rows`` is."""
        return 1

    def default_rows(self, batch_size: int) -> int:
        """Replayed samples beside so many fresh ones, where ``replay.rows`` does not say."""
        return max(1, batch_size // 8)

    def check(self, rows: int, batch_size: int) -> None:
        """Find out whether it can work with so many fresh samples a step.

        Args:
            rows: ``replay.rows`` as the recipe has it, 0 for the policy's default.
            batch_size: ``loop.batch_size``.

        Raises:
            ValueError: it cannot; one line with the key, its value and what is allowed.
        """

    def build(self, rows: int, generator: nn.Module, teacher: nn.Module, images: Tensor, logits: Tensor) -> "ReplaySource":
        """What the student is shown again.

        Args:
            rows: replayed samples a student step.
            generator: on the device of the run.
            teacher: frozen, likewise.
            images: a fresh batch of the run, (B, C, H, W); only shape, layout and device matter.
            logits: the teacher's for it, (B, classes) or (B, classes, H, W), likewise.

        Raises:
            DfkdError: the images do not suit it.
        """
        raise NotImplementedError


class ReplaySource:
    """Where replayed samples come from. A policy overrides what it does otherwise; the rest is nothing.

    A memory either has a ``generator``, whose images are made in one go with the fresh ones, or writes finished images.
    """

    rows: int
    """Replayed samples a student step."""
    generator: nn.Module | None = None
    steps: int = 0
    """It learns in the first so many student steps of an iteration."""
    losses: Sequence[str] = ()
    """Names of what :meth:`learn` returns, in each of those steps."""
    networks: Sequence[nn.Module] = ()
    """What moves while it learns or follows."""
    optimizers: Sequence[torch.optim.Optimizer] = ()
    capturable: bool = True
    """Whether its part of a step can be recorded in a CUDA graph."""
    per_rank: bool = False
    """Whether every process has another one."""
    stores_fresh: bool = False
    """Whether :meth:`end_epoch` stores fresh rows, so that a checkpoint needs those of the last student step, too."""

    @property
    def ready(self) -> bool:
        """Whether there is anything to replay yet."""
        return True

    @contextmanager
    def assumed_ready(self) -> Iterator[None]:
        """Inside, an empty memory replays zeros, so that the steps of later epochs can be tried; afterwards it is empty again."""
        yield

    def latents(self, stream: torch.Generator) -> Tensor:
        """What ``generator`` is called with, (rows, latent_dim)."""
        raise NotImplementedError

    def recall(self, images: Tensor, stream: torch.Generator) -> Tensor | None:
        """Fill ``images``, (rows, C, H, W); returns the teacher's logits for them if they were kept."""
        raise NotImplementedError

    def learn(
        self, batch: Batch, step: int, stream: torch.Generator, autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> dict[str, Tensor]:
        """Learn from the batch of a student step, number ``step`` of its iteration; returns ``losses`` by name, 0-d."""
        return {}

    def follow(self, generator: nn.Module) -> None:
        """The generator has taken a step."""

    def start(self, generator: nn.Module) -> None:
        """The generator is where the game begins: it was made or pretrained."""

    def end_epoch(self, epoch: int, fresh: Batch) -> None:
        """An epoch, counted from 1, is over; ``fresh`` are the fresh rows of its last student step."""

    def state_dict(self) -> dict[str, Any]:
        """Everything it needs to go on."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that :meth:`state_dict` gave."""
