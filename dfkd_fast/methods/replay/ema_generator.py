"""Replay of MAD: an exponential moving average of the generator."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from dfkd_fast.kernels import FusedEMA
from dfkd_fast.models import condition_latents, draw_labels
from dfkd_fast.settings import Fraction

from .policy import Policy, ReplaySource
from .section import register

__all__ = ["EmaGenerator", "EmaGeneratorSettings"]


@register("ema_generator")
class EmaGeneratorSettings(Policy):
    """Recipe section ``[replay.ema_generator]`` (MAD, arXiv 2209.10359)."""

    decay: Fraction = 0.95
    """Decay α of the exponential moving average, updated after every generator step."""

    @override
    def default_rows(self, batch_size: int) -> int:
        return batch_size

    @override
    def build(self, rows: int, generator: nn.Module, teacher: nn.Module, images: Tensor, logits: Tensor) -> ReplaySource:
        return EmaGenerator(generator, self.decay, rows)


class EmaGenerator(ReplaySource):
    """Exponential moving average of the generator, θ̃ ← αθ̃ + (1 − α)θ (MAD, arXiv 2209.10359).

    Floating-point buffers are averaged with the same α, except those that :class:`~dfkd_fast.kernels.FusedEMA` copies. The averaged
    generator is in evaluation mode: it normalizes with the averaged statistics and does not update them. The class embeddings of a
    conditional generator are averaged as well.

    Args:
        generator: Generator to average; the average is initialized as a copy of it.
        decay: Decay α.
        rows: Number of replayed samples per student step.
    """

    generator: nn.Module

    def __init__(self, generator: nn.Module, decay: float, rows: int = 1) -> None:
        self._average = FusedEMA(generator, decay)
        self.generator = self._average.module
        self.networks = [self.generator]
        self.rows = rows
        device = next(generator.parameters()).device
        self._z = torch.empty(rows, int(generator.latent_dim), device=device)  # type: ignore[arg-type]
        self._labels = torch.empty(rows, dtype=torch.long, device=device)
        embedding = getattr(generator, "embedding", None)
        self._num_classes = None if embedding is None else embedding.num_embeddings

    @override
    def latents(self, stream: torch.Generator) -> Tensor:
        self._z.normal_(generator=stream)
        if self._num_classes is None:
            return self._z
        return condition_latents(self.generator, self._z, draw_labels(self._labels, self._num_classes, stream))

    @override
    def follow(self, generator: nn.Module) -> None:
        """Updates the average with the generator's parameters and buffers."""
        self._average.update(generator)

    @override
    def start(self, generator: nn.Module) -> None:
        """Resets the average to a copy of the generator."""
        self.generator.load_state_dict(generator.state_dict())

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.load_state_dict(state["generator"])
