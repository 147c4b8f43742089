"""Drift of the student's predictions between generators of successive epochs (MAD, arXiv 2209.10359, figure 1)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dfkd_fast.kernels import js_discrepancy
from dfkd_fast.models import sample
from dfkd_fast.surgery import eval_mode, get_logits

__all__ = ["Drift"]


class Drift:
    """Divergence between a student's predictions on images of successive versions of a generator, for fixed latents.

    Args:
        samples: Number of latents; 0 disables the comparison.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self._previous_images: dict[str, Tensor] = {}

    def measure(self, student: nn.Module, generators: Mapping[str, nn.Module]) -> dict[str, float]:
        """Compares the student's predictions on images of the current generators and of those at the previous call.

        All networks are run in evaluation mode. Synchronizes the device.

        Args:
            student: Current student, images → logits; evaluated on both versions of the images.
            generators: Modules with an integer attribute ``latent_dim``, by name.

        Returns:
            Jensen–Shannon divergence in nats by generator, averaged over samples or, for segmentation, over pixels. Generators that
            were not part of an earlier call are omitted.
        """
        divergences: dict[str, float] = {}
        for name, generator in generators.items() if self.samples else ():
            images = sample(generator, self.samples, next(generator.parameters()).device)
            if name in self._previous_images:
                with eval_mode(student):
                    logits = get_logits(student(images))
                    total = js_discrepancy(
                        logits,
                        get_logits(student(self._previous_images[name])),
                        temperature=1.0,
                        reduction="sum",
                        scale_by_temperature_squared=False,
                    )
                divergences[name] = total.item() / logits[:, 0].numel()
            self._previous_images[name] = images
        return divergences

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the images of the previous call by generator."""
        return dict(self._previous_images)

    def load_state_dict(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Loads a state returned by :meth:`state_dict` and moves it to a device."""
        self._previous_images = {name: images.to(device) for name, images in state.items()}
