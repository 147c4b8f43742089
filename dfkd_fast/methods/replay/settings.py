"""The recipe's section, and the memory it describes."""

from dataclasses import field
from typing import Literal

import torch
from torch import Tensor, nn

from dfkd_fast.models import Vae
from dfkd_fast.settings import Count, Flag, Fraction, NonNegative, Positive, PositiveInt, settings

from .ema_generator import EmaGenerator
from .memory import Memory
from .memory_bank import MemoryBank
from .vae import VaeReplay

__all__ = ["BankSettings", "Replay", "VaeSettings", "build_memory"]


@settings
class BankSettings:
    """Recipe section ``[replay.memory_bank]`` (MB-DFKD, WACV 2022)."""

    slots: PositiveInt = 10
    """Batches it holds."""
    every: PositiveInt = 5
    """Epochs between two stored batches."""
    storage: Literal["float32", "half", "uint8"] = "half"
    """Of the images."""
    cached_logits: Flag = False
    """Keep the teacher's logits with the images, in place of asking it again."""


@settings
class VaeSettings:
    """Recipe section ``[replay.vae]`` (PRE-DFKD, arXiv 2201.03019)."""

    latent_dim: PositiveInt = 1000
    width: PositiveInt = 64
    """Channels of the encoder's first layer and the decoder's last hidden one."""
    hidden_eps: Positive = 1e-5
    """Of the decoder's batch norms; the public code has .8, as in its generator."""
    uniform_init: NonNegative = 0.0
    """Draw the decoder's weights from U(−this, this) (PRE-DFKD: .08); 0 for the layers' own way."""
    fresh_rows: Count = 0
    """Fresh samples that one of its steps learns from; 0 for half of the batch."""
    lr: Positive = 5e-4
    """Of its Adam."""
    steps: PositiveInt = 4
    """It learns in the first so many student steps of an iteration."""
    latent_lr: NonNegative = 0.02
    """Of the one step that replayed latents take before they are decoded; 0 for none."""
    kl: NonNegative = 1e-5
    """Weight of the divergence from N(0, I)."""
    pixel_reconstruction: Flag = True
    """Reconstruct the images as well as what the teacher says of them: the paper does only the latter, its code both."""
    leak: Flag = False
    """Let the gradients of the latents' step go into the decoder's next update, as the public code does by mistake."""


@settings
class Replay:
    """Recipe section ``[replay]``; the student minimises ``fresh_weight · D(fresh) + weight · D(replayed)``."""

    kind: Literal["none", "ema_generator", "memory_bank", "vae"] = "none"
    """``none``: fresh samples only (DFAD). ``ema_generator``: also those of an averaged generator (MAD).
    ``memory_bank``: stored ones (MB-DFKD). ``vae``: an autoencoder's (PRE-DFKD)."""
    rows: Count = 0
    """Replayed samples a step; 0 for as many as fresh ones of ``ema_generator``, and an eighth of the others."""
    ema_decay: Fraction = 0.95
    """Decay α of the averaged generator after each generator step."""
    fresh_weight: NonNegative = 1.0
    weight: NonNegative = 1.0
    """Of the replayed samples; at 0 none are drawn, and the run equals one without replay bit for bit."""
    memory_bank: BankSettings = field(default_factory=BankSettings)
    vae: VaeSettings = field(default_factory=VaeSettings)

    @property
    def replays(self) -> bool:
        """Whether anything is replayed at all."""
        return self.kind != "none" and self.weight > 0

    def rows_of(self, batch_size: int) -> int:
        """Replayed samples beside so many fresh ones."""
        return self.rows or (batch_size if self.kind == "ema_generator" else max(1, batch_size // 8))


def build_memory(wanted: Replay, generator: nn.Module, teacher: nn.Module, images: Tensor, logits: Tensor) -> Memory | None:
    """What the student is shown again; None for nothing.

    Args:
        wanted: which kind.
        generator: on the device of the run.
        teacher: frozen, likewise.
        images: a fresh batch of the run, (B, C, H, W); only shape, layout and device matter.
        logits: the teacher's for it.

    Raises:
        DfkdError: the images do not suit the autoencoder.
    """
    if not wanted.replays:
        return None
    batch_size = len(images)
    rows = wanted.rows_of(batch_size)
    if wanted.kind == "ema_generator":
        return EmaGenerator(generator, wanted.ema_decay, rows)
    if wanted.kind == "memory_bank":
        bank = wanted.memory_bank
        example, answers = images[:1].expand(rows, -1, -1, -1), logits[:1].expand(rows, *logits.shape[1:])
        return MemoryBank(example, answers, slots=bank.slots, every=bank.every, storage=bank.storage, cached_logits=bank.cached_logits)
    vae = wanted.vae
    network = Vae(vae.latent_dim, images.shape[1], images.shape[2], vae.width, hidden_eps=vae.hidden_eps, uniform_init=vae.uniform_init)
    return VaeReplay(
        network.to(images.device).to(memory_format=_layout(images)),
        teacher,
        rows=rows,
        fresh_rows=vae.fresh_rows or max(1, batch_size // 2),
        lr=vae.lr,
        steps=vae.steps,
        latent_lr=vae.latent_lr,
        kl=vae.kl,
        pixels=vae.pixel_reconstruction,
        leak=vae.leak,
    )


def _layout(images: Tensor) -> torch.memory_format:
    channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format
