"""Supervised training of a teacher, the only training that uses data."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast.errors import DfkdError, NonFiniteLossError, first_line
from dfkd_fast.kernels import FusedEMA
from dfkd_fast.labels import IGNORE_INDEX
from dfkd_fast.surgery import get_logits

from .clock import Clock
from .device import benchmark_convolutions
from .epoch import Epoch
from .method import Engine
from .optim import Optimizer, build_optimizer, build_schedule, restore_learning_rates
from .precision import Precision, default_modes
from .prepare import prepare_teacher_training

__all__ = ["TeacherTrainer", "focal_loss"]


def focal_loss(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Returns the focal loss −(1 − p)^γ log p, where p is the probability of the label (Lin et al. 2017, arXiv 1708.02002).

    Args:
        logits: Logits (N, C) or (N, C, H, W).
        labels: Class labels (N,) or (N, H, W); entries equal to ``IGNORE_INDEX`` are ignored.
        gamma: Focusing parameter γ; 0 gives the cross-entropy.

    Returns:
        Mean over all labels that are not ignored, 0-d.
    """
    if not gamma:
        return F.cross_entropy(logits, labels)
    nll = F.cross_entropy(logits, labels, reduction="none")  # −log p; 0 for ignored labels
    # expm1, since 1 − p loses all digits for p near 1; clamped, since the gradient of the power at 0 is infinite for γ < 1.
    complement = -torch.expm1(-nll)
    return (complement.clamp(min=torch.finfo(complement.dtype).tiny).pow(gamma) * nll).sum() / (labels != IGNORE_INDEX).sum()


class TeacherTrainer:
    """Trains a network with the cross-entropy or the focal loss. Iterating over the trainer yields one :class:`Epoch` at a time.

    Args:
        network: Maps images to logits or to an output accepted by ``get_logits``; trained in place.
        batches: Batches of images (B, C, H, W) and labels (B,) or (B, H, W), iterated once per epoch. Their order must be drawn from
            ``stream``.
        optimizer: Settings of the optimizer and its schedule.
        epochs: Total number of epochs.
        stream: Random number generator of ``batches``, saved in the state.
        images: Example images (B, C, H, W), for which the network is prepared; only the shape matters.
        device: Device to which the network is moved.
        engine: Precision and optimizations of the steps.
        focal_gamma: Focusing parameter of :func:`focal_loss`.
        ema_decay: Decay of the exponential moving average of the weights, which is evaluated and is the :attr:`result`; 0 disables it.
        evaluate: Returns the accuracy of the :attr:`result` in percent.
        evaluate_every: Number of epochs between evaluations; 0 disables them.
        on_batch: Called after every batch with the number of completed batches in the epoch.
    """

    def __init__(
        self,
        network: nn.Module,
        batches: Iterable[tuple[Tensor, Tensor]],
        optimizer: Optimizer,
        epochs: int,
        stream: torch.Generator,
        images: Tensor,
        device: torch.device,
        *,
        engine: Engine | None = None,
        focal_gamma: float = 0.0,
        ema_decay: float = 0.0,
        evaluate: Callable[[nn.Module], float] | None = None,
        evaluate_every: int = 0,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        self.network = network
        self.batches = batches
        self.epochs = epochs
        self.stream = stream
        self.device = device
        self.focal_gamma = focal_gamma
        self.evaluate, self.evaluate_every = evaluate, evaluate_every
        self.on_batch = on_batch
        engine = engine or Engine()
        self.layout = torch.channels_last if engine.channels_last else torch.contiguous_format
        self.precision = Precision(engine.precision, device, roles=["teacher"])
        self.prepared, self.notes = prepare_teacher_training(network, engine, self.precision, device, images.to(device))
        self.average = FusedEMA(network, ema_decay) if ema_decay else None
        self.optimizer = build_optimizer(optimizer, network.parameters(), device)
        self.schedule = build_schedule(optimizer, self.optimizer, epochs)
        self.clock = Clock(device)
        self.history: list[Epoch] = []
        """Completed epochs."""
        self._stopping = False

    @property
    def epochs_done(self) -> int:
        """Number of completed epochs."""
        return len(self.history)

    @property
    def finished(self) -> bool:
        """Whether all epochs are complete."""
        return self.epochs_done >= self.epochs

    @property
    def iterations_done(self) -> int:
        """Number of completed epochs, which numbers the checkpoints."""
        return self.epochs_done

    @property
    def result(self) -> nn.Module:
        """Network that is evaluated and saved: the trained network, or its exponential moving average."""
        return self.network if self.average is None else self.average.module

    def stop(self) -> None:
        """Stops a running loop after the current batch and restores the state from before the current epoch."""
        self._stopping = True

    def __iter__(self) -> Iterator[Epoch]:
        while not self.finished:
            backup = copy.deepcopy(self.state_dict())
            with self.clock.phase("teacher"), benchmark_convolutions(self.device), default_modes(self.device):
                loss = self._run_epoch()
            if loss is None:
                self.load_state_dict(backup)
                return
            number = self.epochs_done + 1
            if not loss.isfinite():
                raise NonFiniteLossError(f"the teacher's loss is {loss.item()} in epoch {number}")
            accuracy = None
            if self.evaluate is not None and self.evaluate_every and (number % self.evaluate_every == 0 or number == self.epochs):
                with self.clock.phase("evaluation"):
                    accuracy = self.evaluate(self.result)
            seconds = math.fsum(self.clock.read().values()) - math.fsum(epoch.seconds for epoch in self.history)
            epoch = Epoch(number, seconds, {"teacher": loss.item()}, accuracy)
            self.history.append(epoch)
            yield epoch

    def _run_epoch(self) -> Tensor | None:
        """Runs one pass over the data; returns the mean loss over batches, or None if it was stopped."""
        self.prepared.train()
        total, count = torch.zeros((), device=self.device), 0
        for images, labels in self.batches:
            images = images.to(self.device, non_blocking=True, memory_format=self.layout)
            with self.precision.autocast():
                logits = get_logits(self.prepared(images))
            if self.precision.dtype is not None:  # a forward that computes them outside of a layer rounds them
                logits = logits.float()
            loss = focal_loss(logits, labels.to(self.device, non_blocking=True), self.focal_gamma)
            self.optimizer.zero_grad()
            self.precision.scale("teacher", loss).backward()
            self.precision.step("teacher", self.optimizer)
            if self.average is not None:
                self.average.update(self.network)
            total += loss.detach()
            count += 1
            if self.on_batch is not None:
                self.on_batch(count)
            if self._stopping:
                return None
        if count == 0:
            raise DfkdError("there is no batch of training images: at least two images are needed")
        self.schedule.step()
        return total / count

    def state_dict(self) -> dict[str, Any]:
        """Returns the state after the last complete epoch."""
        return {
            "network": self.network.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "precision": self.precision.state_dict(),
            "stream": self.stream.get_state(),
            "torch_random_state": torch.get_rng_state(),
            "cuda_random_state": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "history": [asdict(epoch) for epoch in self.history],
            "seconds": self.clock.read(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a state returned by :meth:`state_dict`.

        Raises:
            DfkdError: The state belongs to another network, optimizer or precision, or has more epochs than this training.
        """
        try:
            history = _history(state)
            if len(history) > self.epochs:
                raise DfkdError(f"teacher.epochs = {self.epochs}: the state has already completed {len(history)} epochs")
            self.network.load_state_dict(state["network"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            restore_learning_rates(self.optimizer, self.device)
            self.schedule.load_state_dict(state["schedule"])
            if "precision" in state:  # early versions trained teachers in float32 only
                self.precision.load_state_dict(state["precision"])
            self.stream.set_state(state["stream"])
            torch.set_rng_state(state["torch_random_state"])
            if state.get("cuda_random_state") is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_random_state"], self.device)
            self.history = history
            self.clock.seconds.update(state["seconds"])
        except DfkdError:
            raise
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise DfkdError(f"the state does not match the teacher: {first_line(error)}") from error


def _history(state: dict[str, Any]) -> list[Epoch]:
    """Returns the completed epochs of a state; early versions stored only their number."""
    if "history" in state:
        return [Epoch(**epoch) for epoch in state["history"]]
    return [Epoch(number, state["seconds"]["teacher"] / state["done"], {}, None) for number in range(1, state["done"] + 1)]
