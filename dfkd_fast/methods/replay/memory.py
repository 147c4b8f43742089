"""What every kind of replay answers to."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import Batch

__all__ = ["Memory"]


class Memory:
    """Where replayed samples come from. A kind overrides what it does otherwise; the rest is nothing.

    A memory either has a ``generator``, whose images are made in one go with the fresh ones, or writes finished images.
    """

    rows: int
    """Replayed samples a student step."""
    generator: nn.Module | None = None
    steps: int = 0
    """It learns in the first so many student steps of an iteration."""
    networks: Sequence[nn.Module] = ()
    """What moves while it learns or follows."""
    optimizers: Sequence[torch.optim.Optimizer] = ()
    capturable: bool = True
    """Whether its part of a step can be recorded in a CUDA graph."""
    private: bool = False
    """Whether every process has another one."""

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
        """Learn from the batch of a student step, number ``step`` of its iteration; returns losses by name, 0-d."""
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
