"""Second axis: what the student sees beside fresh samples, so that it does not forget."""

import copy
from typing import Literal

from torch import Tensor, nn

from dfkd_fast.kernels import ema_update_
from dfkd_fast.models import freeze
from dfkd_fast.settings import Fraction, NonNegative, settings

__all__ = ["EmaGenerator", "Replay"]


@settings
class Replay:
    """Recipe section ``[replay]``; the student minimises ``fresh_weight · D(fresh) + weight · D(replayed)``."""

    kind: Literal["none", "ema_generator"] = "none"
    """``none``: fresh samples only (DFAD). ``ema_generator``: as many again from an averaged generator (MAD)."""
    ema_decay: Fraction = 0.95
    """Decay α of the averaged generator after each generator step."""
    fresh_weight: NonNegative = 1.0
    weight: NonNegative = 1.0
    """Of the replayed samples; at 0 none are drawn, and the run equals one without replay bit for bit."""


class EmaGenerator:
    """MAD's slowly moving copy of the generator, θ̃ ← αθ̃ + (1 − α)θ (arXiv 2209.10359). It is never trained.

    Floating buffers are averaged with the same α and integer ones copied; being in evaluation mode, it
    normalises with the averaged statistics and leaves them alone.

    Args:
        generator: what it starts as a copy of.
        decay: α.
    """

    def __init__(self, generator: nn.Module, decay: float) -> None:
        self.network = freeze(copy.deepcopy(generator))
        self.decay = decay

    def follow(self, generator: nn.Module) -> None:
        """Move towards the generator's parameters and buffers."""
        ema_update_(_state(self.network), _state(generator), self.decay)


def _state(network: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in (*network.parameters(), *network.buffers())]
