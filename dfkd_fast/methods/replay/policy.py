"""Base classes of replay: the settings of a policy and the source of replayed samples that they build."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..batch import Batch

__all__ = ["Policy", "ReplaySource"]


class Policy:
    """Base class for the settings of a replay policy.

    A subclass decorated with ``@register(KIND)`` is the recipe section ``[replay.KIND]``. Every key needs a default. Subclasses must
    implement :meth:`build`; the other members may be overridden.
    """

    fp16: ClassVar[bool] = True
    """Whether the policy supports ``engine.precision = "fp16"``. A policy with its own backward passes, which do not use loss
    scaling, sets it to False."""

    @property
    def smallest_batch(self) -> int:
        """Minimum number of fresh samples per step, independent of ``replay.rows``."""
        return 1

    def default_rows(self, batch_size: int) -> int:
        """Returns the number of replayed samples per step for ``replay.rows = 0``.

        Args:
            batch_size: Number of fresh samples per step.
        """
        return max(1, batch_size // 8)

    def check(self, rows: int, batch_size: int) -> None:
        """Validates the settings against the batch size.

        Args:
            rows: Value of ``replay.rows``; 0 selects :meth:`default_rows`.
            batch_size: Value of ``loop.batch_size``.

        Raises:
            ValueError: The combination is not supported. The message is one line with the key, its value and the allowed values.
        """

    def build(self, rows: int, generator: nn.Module, teacher: nn.Module, images: Tensor, logits: Tensor) -> "ReplaySource":
        """Builds the source of replayed samples.

        Args:
            rows: Number of replayed samples per student step.
            generator: Generator, on the device of the run.
            teacher: Frozen teacher, on the device of the run.
            images: Buffer of a fresh batch (B, C, H, W); only its shape, memory format, dtype and device are used.
            logits: Buffer of the teacher's logits, (B, classes) or (B, classes, H, W); used in the same way.

        Raises:
            DfkdError: The policy does not support images of this shape.
        """
        raise NotImplementedError


class ReplaySource:
    """Base class for sources of replayed samples.

    A source either has a ``generator``, which is run on :meth:`latents` in the same step as the main generator, or writes images
    directly in :meth:`recall`. All other methods do nothing by default.
    """

    rows: int
    """Number of replayed samples per student step."""
    generator: nn.Module | None = None
    """Generator of the replayed samples; None if :meth:`recall` provides the images."""
    steps: int = 0
    """Number of student steps per iteration, counted from the first, in which :meth:`learn` is called."""
    losses: Sequence[str] = ()
    """Names of the losses that :meth:`learn` returns in each of these steps."""
    networks: Sequence[nn.Module] = ()
    """Networks whose parameters or buffers :meth:`learn` or :meth:`follow` updates."""
    optimizers: Sequence[torch.optim.Optimizer] = ()
    """Optimizers that :meth:`learn` steps."""
    capturable: bool = True
    """Whether the source can be captured in a CUDA graph."""
    per_rank: bool = False
    """Whether the state differs between processes."""
    stores_fresh: bool = False
    """Whether :meth:`end_epoch` or :meth:`end_iteration` stores fresh samples. Checkpoints then include the last
    student step's batch."""

    @property
    def ready(self) -> bool:
        """Whether samples are available for replay."""
        return True

    @contextmanager
    def assumed_ready(self) -> Iterator[None]:
        """Context manager in which an empty source replays zeros, so that the steps of later epochs can be warmed up."""
        yield

    def latents(self, stream: torch.Generator) -> Tensor:
        """Returns inputs (rows, latent_dim) for ``generator``.

        Args:
            stream: Random number generator to draw from.
        """
        raise NotImplementedError

    def recall(self, images: Tensor, stream: torch.Generator) -> Tensor | None:
        """Writes replayed samples to a buffer.

        Args:
            images: Buffer (rows, C, H, W) to fill in place.
            stream: Random number generator to draw from.

        Returns:
            The teacher's logits for the samples if they were stored; None if they have to be computed.
        """
        raise NotImplementedError

    def learn(
        self, batch: Batch, step: int, stream: torch.Generator, autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> dict[str, Tensor]:
        """Trains the source on the batch of a student step.

        Args:
            batch: Batch of the student step.
            step: Index of the student step in its iteration, from 0.
            stream: Random number generator to draw from.
            autocast: Returns the context manager for forward passes.

        Returns:
            The losses by name (:attr:`losses`), each 0-d and detached.
        """
        return {}

    def follow(self, generator: nn.Module) -> None:
        """Called after every step of the generator, except in pretraining."""

    def start(self, generator: nn.Module) -> None:
        """Called once after the generator's pretraining."""

    def end_iteration(self, iteration: int, fresh: Batch) -> None:
        """Called at the end of every iteration.

        Args:
            iteration: Number of the iteration since the start of the run, from 1.
            fresh: Fresh samples of its last student step.
        """

    def end_epoch(self, epoch: int, fresh: Batch) -> None:
        """Called at the end of every epoch.

        Args:
            epoch: Number of the epoch, from 1.
            fresh: Fresh samples of its last student step.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns the state to save in a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a state returned by :meth:`state_dict`."""
