"""What the steps read and write, and what a checkpoint holds of a training."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from dfkd_fast.kernels import FusedEMA
from dfkd_fast.methods import Batch, Part, ReplaySource
from dfkd_fast.surgery import Observer

from .clock import Clock
from .drift import Drift
from .epoch import Epoch
from .losses import LossLog
from .method import Method
from .precision import Precision

__all__ = ["TrainState", "isolated_callback", "preserved"]


@dataclass
class TrainState:
    """Networks, optimizers, random streams and static buffers of a training, all on one device, and how far it is."""

    device: torch.device
    method: Method
    precision: Precision

    teacher: nn.Module
    """As the steps call it: folded, in the precision of the run."""
    observer: Observer
    """The same as the generator sees it."""
    student: nn.Module
    """As the steps call it; shares parameters and buffers with the one that was given, as the generator does."""
    generator: nn.Module
    replay_source: ReplaySource | None
    average: FusedEMA | None
    """Of the student."""
    saved_networks: dict[str, nn.Module]
    """What a checkpoint holds, by name: student and generator as they were given, and the student's average."""
    teacher_sha256: str

    student_optimizer: torch.optim.Optimizer
    generator_optimizer: torch.optim.Optimizer
    schedules: list[LRScheduler]
    """Of the student's and the generator's learning rate."""

    latents: Tensor
    """(B, latent_dim), overwritten with new z ~ N(0, I) before every use."""
    labels: Tensor
    """(B,), likewise, with classes for a conditional generator."""
    images: Tensor
    """(ΣB_i, C, H, W): the batch of the student step, fresh rows first."""
    logits: Tensor
    """(ΣB_i, classes) or (ΣB_i, classes, H, W): the teacher's for them."""
    fresh_stream: torch.Generator
    replay_stream: torch.Generator

    losses: LossLog
    drift: Drift
    clock: Clock
    notes: list[str]
    """What was asked for and is done another way, a line each."""
    history: list[Epoch] = field(default_factory=list)
    iteration: int = 0
    """Iterations done of the epoch under way."""
    pretrained: int = 0
    """Steps the generator took before the first iteration."""

    @property
    def fresh_batch(self) -> Batch:
        """The fresh rows of the last student step."""
        rows = len(self.latents)
        return Batch(self.images[:rows], self.logits[:rows], [Part(rows, 1.0)])

    @property
    def generators(self) -> dict[str, nn.Module]:
        """What makes the student's images: "generator" and, where the memory has one, "replay"."""
        replay = None if self.replay_source is None else self.replay_source.generator
        return {"generator": self.generator} | ({} if replay is None else {"replay": replay})

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """All that steps use."""
        return [self.student_optimizer, self.generator_optimizer, *([] if self.replay_source is None else self.replay_source.optimizers)]

    @property
    def random_devices(self) -> list[torch.device]:
        """What :func:`torch.random.fork_rng` is told."""
        return [self.device] if self.device.type == "cuda" else []

    def running_statistics(self) -> list[Tensor]:
        """Floating-point buffers, of which processes have different ones until an epoch ends: they have seen other images."""
        networks = [*self.saved_networks.values(), *([] if self.replay_source is None else self.replay_source.networks)]
        return [buffer for network in networks for buffer in network.buffers() if buffer.is_floating_point()]

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that a step changes and a later one reads: weights, buffers, and the optimizers' and scalers' state."""
        networks: list[nn.Module] = [self.student, self.generator]
        networks += [] if self.average is None else [self.average]
        networks += [] if self.replay_source is None else self.replay_source.networks
        for network in networks:
            yield from network.parameters()
            yield from network.buffers()
        for optimizer in self.optimizers:
            # Not all of it is a parameter's: apex's Adam counts its steps in the group.
            for values in (*optimizer.state.values(), *optimizer.param_groups):
                yield from (value for value in values.values() if isinstance(value, Tensor))
        yield from self.precision.tensors()

    def drop_gradients(self) -> None:
        """Free the gradients of everything that is trained."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()


@contextmanager
def preserved(state: TrainState) -> Iterator[None]:
    """Whatever steps are taken inside, even one that fails, afterwards tensors and random streams are as they were, in place.

    Gradients are dropped.
    """
    before = [(tensor, tensor.detach().clone()) for tensor in state.tensors()]
    streams = [(stream, stream.get_state()) for stream in (state.fresh_stream, state.replay_stream)]
    try:
        with torch.random.fork_rng(devices=state.random_devices):
            yield
    finally:
        with torch.no_grad():
            known = {id(tensor) for tensor, _ in before}
            for tensor, value in before:
                tensor.copy_(value)
            for tensor in state.tensors():
                if id(tensor) not in known:
                    tensor.zero_()  # an optimizer's state, which its first step makes, and which begins at 0
        for stream, position in streams:
            stream.set_state(position)
        state.drop_gradients()


@contextmanager
def isolated_callback(state: TrainState) -> Iterator[None]:
    """Whatever a callback inside does, afterwards random states, modes and what is to be trained are as before."""
    trained = [(tensor, tensor.requires_grad) for network in (state.student, state.generator) for tensor in network.parameters()]
    try:
        with torch.random.fork_rng(devices=state.random_devices), torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        for tensor, requires_grad in trained:
            tensor.requires_grad_(requires_grad)
        # Scripted modules are shared with the networks that a callback sees.
        state.student.train()
        state.generator.train()
        if state.average is not None:
            state.average.module.eval()
