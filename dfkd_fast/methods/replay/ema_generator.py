"""MAD's replay: a slowly moving average of the generator."""

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
    """Decay α of the averaged generator after each generator step."""

    @override
    def default_rows(self, batch_size: int) -> int:
        return batch_size

    @override
    def build(self, rows: int, generator: nn.Module, teacher: nn.Module, images: Tensor, logits: Tensor) -> ReplaySource:
        return EmaGenerator(generator, self.decay, rows)


class EmaGenerator(ReplaySource):
    """MAD's slowly moving copy of the generator, θ̃ ← αθ̃ + (1 − α)θ (arXiv 2209.10359). It is never trained.

    Floating buffers are averaged with the same α, but for those that :class:`~dfkd_fast.kernels.FusedEMA` copies; being in
    evaluation mode, it normalises with the averaged statistics and leaves them alone. The class embeddings of a conditional
    generator are averaged with it.

    Args:
        generator: what it starts as a copy of.
        decay: α.
        rows: samples a student step.
    """

    generator: nn.Module

    def __init__(self, generator: nn.Module, decay: float, rows: int = 1) -> None:
        self._average = FusedEMA(generator, decay)
        self.generator = self._average.module
        self.networks = [self.generator]
        self.rows = rows
        place = next(generator.parameters())
        self._z = torch.empty(rows, int(generator.latent_dim), device=place.device)  # type: ignore[arg-type]
        self._labels = torch.empty(rows, dtype=torch.long, device=place.device)
        embedding = getattr(generator, "embedding", None)
        self._classes = None if embedding is None else embedding.num_embeddings

    @override
    def latents(self, stream: torch.Generator) -> Tensor:
        self._z.normal_(generator=stream)
        if self._classes is None:
            return self._z
        return condition_latents(self.generator, self._z, draw_labels(self._labels, self._classes, stream))

    @override
    def follow(self, generator: nn.Module) -> None:
        """Move towards the generator's parameters and buffers."""
        self._average.update(generator)

    @override
    def start(self, generator: nn.Module) -> None:
        """Begin as a copy of the generator."""
        self.generator.load_state_dict(generator.state_dict())

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.load_state_dict(state["generator"])
