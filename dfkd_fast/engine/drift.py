"""How far a student's predictions move when the generator does (MAD, arXiv 2209.10359, figure 1)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dfkd_fast.kernels import js_discrepancy
from dfkd_fast.models import sample
from dfkd_fast.surgery import eval_mode, get_logits

__all__ = ["Drift"]


class Drift:
    """Compares a student's predictions on successive versions of generators, always from the same latents.

    Args:
        samples: how many latents; 0 for no comparison.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self._before: dict[str, Tensor] = {}

    def measure(self, student: nn.Module, generators: Mapping[str, nn.Module]) -> dict[str, float]:
        """Mean Jensen–Shannon divergence in nats, a sample or a pixel, by generator, between the student's predictions on images of
        this version and of that at the last call; nothing at a generator's first. All networks are in evaluation mode; waits
        for the device.

        Args:
            student: images → logits, as it stands now, for both versions.
            generators: modules with an integer ``latent_dim``, by name.
        """
        found: dict[str, float] = {}
        for name, generator in generators.items() if self.samples else ():
            now = sample(generator, self.samples, next(generator.parameters()).device)
            if name in self._before:
                with eval_mode(student):
                    logits = get_logits(student(now))
                    moved = js_discrepancy(
                        logits,
                        get_logits(student(self._before[name])),
                        temperature=1.0,
                        reduction="sum",
                        scale_by_temperature_squared=False,
                    )
                found[name] = moved.item() / logits[:, 0].numel()
            self._before[name] = now
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """The images of the last call."""
        return dict(self._before)

    def load_state_dict(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Go on from a state that :meth:`state_dict` gave."""
        self._before = {name: images.to(device) for name, images in state.items()}
