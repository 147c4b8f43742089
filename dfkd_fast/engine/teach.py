"""Supervised training of a teacher: the only training that sees data, handed to it as batches."""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast.errors import DfkdError, NonFiniteLossError, first_line
from dfkd_fast.labels import IGNORE_INDEX
from dfkd_fast.surgery import get_logits

from .clock import Clock
from .device import cudnn_benchmark
from .epoch import Epoch
from .optim import Optimizer, build_optimizer, build_schedule, restore_learning_rates

__all__ = ["TeacherTrainer", "focal_loss"]


def focal_loss(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """−(1 − p)^γ log p of the label's probability p, the mean over what has a label (Lin et al. 2017, arXiv 1708.02002); 0-d.

    Args:
        logits: (N, C) or (N, C, H, W).
        labels: classes (N,) or (N, H, W); ``IGNORE_INDEX`` where there is none.
        gamma: γ; 0 is cross-entropy.
    """
    if not gamma:
        return F.cross_entropy(logits, labels)
    surprise = F.cross_entropy(logits, labels, reduction="none")  # −log p, and 0 where there is no label
    # Not 1 − p: at p near 1 all of its digits would be lost, and its power's gradient at 0 is infinite for γ < 1.
    missed = -torch.expm1(-surprise)
    return (missed.clamp(min=torch.finfo(missed.dtype).tiny).pow(gamma) * surprise).sum() / (labels != IGNORE_INDEX).sum()


class TeacherTrainer:
    """Trains a network by cross-entropy or the focal loss. Iterate over it for one :class:`Epoch` at a time.

    Args:
        network: images → logits, in any form that ``get_logits`` takes; trained in place.
        batches: (images (B, C, H, W), labels (B,) or (B, H, W)), iterated anew each epoch; it must draw its order from ``stream``.
        optimizer: settings of the optimiser and its schedule.
        epochs: how many there are in all.
        stream: the random stream of ``batches``, kept in the state.
        device: where the network is moved.
        focal_gamma: of :func:`focal_loss`.
        on_batch: called after every batch with how many of the epoch are done, for a progress bar.
    """

    def __init__(
        self,
        network: nn.Module,
        batches: Iterable[tuple[Tensor, Tensor]],
        optimizer: Optimizer,
        epochs: int,
        stream: torch.Generator,
        device: torch.device,
        *,
        focal_gamma: float = 0.0,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        self.network = network.to(device).to(memory_format=torch.channels_last)
        self.batches = batches
        self.epochs = epochs
        self.stream = stream
        self.device = device
        self.focal_gamma = focal_gamma
        self.on_batch = on_batch
        self.optimizer = build_optimizer(optimizer, network.parameters(), device)
        self.schedule = build_schedule(optimizer, self.optimizer, epochs)
        self.clock = Clock(device)
        self.done = 0
        """Epochs done."""
        self._stopping = False

    @property
    def finished(self) -> bool:
        """Whether every epoch is done."""
        return self.done >= self.epochs

    @property
    def iterations_done(self) -> int:
        """Epochs since the beginning: what checkpoints are numbered by."""
        return self.done

    def stop(self) -> None:
        """Ask a running loop to end after the batch under way, as if the epoch had not begun."""
        self._stopping = True

    def __iter__(self) -> Iterator[Epoch]:
        while not self.finished:
            start = copy.deepcopy(self.state_dict())
            before = self.clock.read().get("teacher", 0.0)
            with self.clock.phase("teacher"), cudnn_benchmark(self.device):
                loss = self._run_epoch()
            if loss is None:
                self.load_state_dict(start)
                return
            if not loss.isfinite():
                raise NonFiniteLossError(f"the teacher's loss is {loss.item()} in epoch {self.done + 1}")
            self.done += 1
            yield Epoch(self.done, self.clock.read()["teacher"] - before, {"teacher": loss.item()}, None)

    def _run_epoch(self) -> Tensor | None:
        """Mean loss of one pass over the data, or None where it was stopped."""
        self.network.train()
        total, count = torch.zeros((), device=self.device), 0
        for images, labels in self.batches:
            images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
            loss = focal_loss(get_logits(self.network(images)), labels.to(self.device, non_blocking=True), self.focal_gamma)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.detach()
            count += 1
            if self.on_batch is not None:
                self.on_batch(count)
            if self._stopping:
                return None
        self.schedule.step()
        return total / count

    def state_dict(self) -> dict[str, Any]:
        """Everything the training needs to go on after its last whole epoch."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "stream": self.stream.get_state(),
            "torch_random_state": torch.get_rng_state(),
            "cuda_random_state": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "done": self.done,
            "seconds": self.clock.read(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that :meth:`state_dict` gave.

        Raises:
            DfkdError: it is the state of something else, or of more epochs than there are in all.
        """
        try:
            if state["done"] > self.epochs:
                raise DfkdError(f"teacher.epochs = {self.epochs}: the state has {state['done']} epochs done already")
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            restore_learning_rates(self.optimizer, self.device)
            self.schedule.load_state_dict(state["schedule"])
            self.stream.set_state(state["stream"])
            torch.set_rng_state(state["torch_random_state"])
            if state.get("cuda_random_state") is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_random_state"], self.device)
            self.done = state["done"]
            self.clock.seconds.update(state["seconds"])
        except DfkdError:
            raise
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise DfkdError(f"the state is not of this teacher: {first_line(error)}") from error
