"""State of a training: everything that the steps read and write and that checkpoints contain."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from dfkd_fast.kernels import FusedEMA
from dfkd_fast.methods import Batch, Part, ReplaySource
from dfkd_fast.surgery import FeatureVectors, Observer

from .clock import Clock
from .drift import Drift
from .epoch import Epoch
from .losses import LossLog
from .method import Method
from .precision import Precision

__all__ = ["Features", "TrainState", "isolated_callback", "preserved"]


@dataclass
class Features:
    """Feature vectors that student steps compare (``objective.attention``, ``hint`` and ``features``)."""

    teacher: FeatureVectors
    student: FeatureVectors
    vectors: Tensor
    """Buffer (ΣB_i, D) of the teacher's vectors for :attr:`TrainState.images`."""


@dataclass
class TrainState:
    """Networks, optimizers, random number generators, static buffers and progress of a training, all on one device."""

    device: torch.device
    method: Method
    precision: Precision

    teacher: nn.Module
    """Optimized copy of the teacher: folded, in the precision of the run."""
    observer: Observer
    """Wrapper of :attr:`teacher` for generator steps that also returns features and batch statistics."""
    student: nn.Module
    """Optimized copy of the student that shares parameters and buffers with the user's module."""
    generator: nn.Module
    """Optimized copy of the generator that shares parameters and buffers with the user's module."""
    features: Features | None
    """Feature vectors of teacher and student; None if only logits are compared."""
    replay_source: ReplaySource | None
    """Source of replayed samples; None without replay."""
    average: FusedEMA | None
    """Exponential moving average of the student; None if ``loop.student_ema_decay`` is 0."""
    saved_networks: dict[str, nn.Module]
    """Networks saved in checkpoints, by name: the user's student and generator, the student's average and the hint's projection."""
    teacher_sha256: str
    """SHA-256 of the teacher's state dict."""

    student_optimizer: torch.optim.Optimizer
    generator_optimizer: torch.optim.Optimizer
    schedules: list[LRScheduler]
    """Learning rate schedulers of the student and the generator."""

    latents: Tensor
    """Buffer (B, latent_dim), overwritten with z ~ N(0, I) in every step."""
    labels: Tensor
    """Buffer (B,), overwritten with class labels in every step if the generator is conditional."""
    images: Tensor
    """Buffer (ΣB_i, C, H, W) of the student step's images, fresh rows first."""
    logits: Tensor
    """Buffer (ΣB_i, classes) or (ΣB_i, classes, H, W) of the teacher's logits for :attr:`images`."""
    fresh_stream: torch.Generator
    """Random number generator of fresh latents and labels."""
    replay_stream: torch.Generator
    """Random number generator of the replay source."""

    losses: LossLog
    drift: Drift
    clock: Clock
    notes: list[str]
    """One line for each requested optimization that could not be applied, or that was applied differently."""
    history: list[Epoch] = field(default_factory=list)
    """Completed epochs."""
    iteration: int = 0
    """Number of completed iterations in the current epoch."""
    pretrained: int = 0
    """Number of completed pretraining steps of the generator."""
    calibrated: bool = False
    """Whether a quantized student has been calibrated."""

    @property
    def fresh_batch(self) -> Batch:
        """Fresh samples of the last student step."""
        rows = len(self.latents)
        return Batch(self.images[:rows], self.logits[:rows], [Part(rows, 1.0)])

    @property
    def generators(self) -> dict[str, nn.Module]:
        """Generators of the student's images by name: "generator" and, if the replay source has one, "replay"."""
        replay = None if self.replay_source is None else self.replay_source.generator
        return {"generator": self.generator} | ({} if replay is None else {"replay": replay})

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Optimizers of the student, the generator and the replay source."""
        return [self.student_optimizer, self.generator_optimizer, *([] if self.replay_source is None else self.replay_source.optimizers)]

    @property
    def random_devices(self) -> list[torch.device]:
        """Argument ``devices`` of :func:`torch.random.fork_rng`."""
        return [self.device] if self.device.type == "cuda" else []

    def running_statistics(self) -> list[Tensor]:
        """Returns the floating-point buffers of all trained networks, which differ between processes until the end of an epoch."""
        networks = [*self.saved_networks.values(), *([] if self.replay_source is None else self.replay_source.networks)]
        return [buffer for network in networks for buffer in network.buffers() if buffer.is_floating_point()]

    def tensors(self) -> Iterator[Tensor]:
        """Yields every tensor that a step modifies and a later one reads: parameters, buffers, optimizer and scaler states."""
        student = self.student if self.features is None else self.features.student  # which includes the projection
        networks: list[nn.Module] = [student, self.generator]
        networks += [] if self.average is None else [self.average]
        networks += [] if self.replay_source is None else self.replay_source.networks
        for network in networks:
            yield from network.parameters()
            yield from network.buffers()
        for optimizer in self.optimizers:
            # Param groups as well: apex's Adam keeps its step counter there.
            for values in (*optimizer.state.values(), *optimizer.param_groups):
                yield from (value for value in values.values() if isinstance(value, Tensor))
        yield from self.precision.tensors()

    def drop_gradients(self) -> None:
        """Sets all gradients to None."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()


@contextmanager
def preserved(state: TrainState) -> Iterator[None]:
    """Context manager that restores tensors in place and random number generators on exit, also after an exception.

    Gradients are set to None.
    """
    saved = [(tensor, tensor.detach().clone()) for tensor in state.tensors()]
    streams = [(stream, stream.get_state()) for stream in (state.fresh_stream, state.replay_stream)]
    try:
        with torch.random.fork_rng(devices=state.random_devices):
            yield
    finally:
        with torch.no_grad():
            known = {id(tensor) for tensor, _ in saved}
            for tensor, value in saved:
                tensor.copy_(value)
            for tensor in state.tensors():
                if id(tensor) not in known:
                    tensor.zero_()  # optimizer state that is created in the first step and starts at 0
        for stream, stream_state in streams:
            stream.set_state(stream_state)
        state.drop_gradients()


@contextmanager
def isolated_callback(state: TrainState) -> Iterator[None]:
    """Context manager for callbacks that restores random states, grad mode, network modes and ``requires_grad`` on exit."""
    flags = [(tensor, tensor.requires_grad) for network in (state.student, state.generator) for tensor in network.parameters()]
    try:
        with torch.random.fork_rng(devices=state.random_devices), torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        for tensor, requires_grad in flags:
            tensor.requires_grad_(requires_grad)
        # Scripted modules are not copied: callbacks may have changed their modes.
        state.student.train()
        state.generator.train()
        if state.average is not None:
            state.average.module.eval()
