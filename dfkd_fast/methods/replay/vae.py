"""Replay of PRE-DFKD: a variational autoencoder trained along with the student."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from dfkd_fast import distributed
from dfkd_fast.kernels import l1_discrepancy
from dfkd_fast.models import Vae
from dfkd_fast.settings import Count, Flag, NonNegative, Positive, PositiveInt

from ..batch import Batch
from ..objective import entropy, one_hot
from .policy import Policy, ReplaySource
from .section import register

__all__ = ["VaeReplay", "VaeSettings"]

DIVERSITY = 5.0
"""Weight of the entropy term in the loss of the latents."""


@register("vae")
class VaeSettings(Policy):
    """Recipe section ``[replay.vae]`` (PRE-DFKD, arXiv 2201.03019)."""

    fp16 = False

    latent_dim: PositiveInt = 1000
    """Dimension of the autoencoder's latents."""
    width: PositiveInt = 64
    """Channels of the encoder's first layer and of the decoder's last hidden layer."""
    hidden_eps: Positive = 1e-5
    """Epsilon of the decoder's batch norms; 0.8 in the paper's public code, as in its generator."""
    uniform_init: NonNegative = 0.0
    """Bound b of the uniform distribution U(−b, b) that initializes the decoder's weights (PRE-DFKD: 0.08); 0 keeps PyTorch's
    default initialization."""
    fresh_rows: Count = 0
    """Number of fresh samples per training step of the autoencoder; 0 selects half of the batch."""
    lr: Positive = 5e-4
    """Learning rate of the autoencoder's Adam optimizer."""
    steps: PositiveInt = 4
    """Number of student steps per iteration, counted from the first, in which the autoencoder is trained."""
    latent_lr: NonNegative = 0.02
    """Learning rate of the single optimization step on replayed latents before they are decoded; 0 disables it."""
    kl: NonNegative = 1e-5
    """Weight of the KL divergence from N(0, I)."""
    pixel_reconstruction: Flag = True
    """Add the L1 reconstruction error of the images to that of the teacher's logits. The paper uses only the logits, its public code
    uses both."""
    leak: Flag = False
    """Accumulate the decoder gradients of the latents' step into the next decoder update, as the public code does by mistake."""

    @property
    @override
    def smallest_batch(self) -> int:
        return self.fresh_rows

    @override
    def check(self, rows: int, batch_size: int) -> None:
        if self.fresh_rows > batch_size:
            raise ValueError(f"replay.vae.fresh_rows = {self.fresh_rows}: must be at most loop.batch_size = {batch_size}")

    @override
    def build(self, rows: int, generator: nn.Module, teacher: nn.Module, images: Tensor, logits: Tensor) -> ReplaySource:
        vae = Vae(self.latent_dim, images.shape[1], images.shape[2], self.width, hidden_eps=self.hidden_eps, uniform_init=self.uniform_init)
        return VaeReplay(
            vae.to(images.device).to(memory_format=_layout(images)),
            teacher,
            rows=rows,
            fresh_rows=self.fresh_rows or max(1, len(images) // 2),
            lr=self.lr,
            steps=self.steps,
            latent_lr=self.latent_lr,
            kl=self.kl,
            pixels=self.pixel_reconstruction,
            leak=self.leak,
        )


def _layout(images: Tensor) -> torch.memory_format:
    channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


class VaeReplay(ReplaySource):
    """Generative pseudo replay with a variational autoencoder (PRE-DFKD, arXiv 2201.03019).

    The autoencoder is trained in the first student steps of every iteration, on fresh samples and on its own replayed samples, which
    prevent it from forgetting. Latents z ~ N(0, I) take one Adam step on :meth:`latent_loss` before they are decoded for replay. The
    decoder is in evaluation mode during replay, and its weights are frozen.

    Args:
        vae: Encoder and decoder, on the device of the run.
        teacher: Frozen teacher: images → logits.
        rows: Number of replayed samples per student step.
        fresh_rows: Number of fresh samples per training step of the autoencoder.
        lr: Learning rate of the autoencoder's Adam optimizer.
        steps: Number of student steps per iteration in which the autoencoder is trained.
        latent_lr: Learning rate of the latents' step; 0 disables it.
        kl: Weight of the KL divergence from N(0, I), summed over the latent dimensions.
        pixels: Whether the loss includes the L1 error of the images. The paper uses only the teacher's logits, its public code both.
        leak: Whether the decoder gradients of the latents' step accumulate into the next decoder update, as in the public code.
    """

    generator: nn.Module
    """The autoencoder's decoder."""
    losses = ("vae",)

    def __init__(
        self,
        vae: Vae,
        teacher: nn.Module,
        *,
        rows: int,
        fresh_rows: int,
        lr: float = 5e-4,
        steps: int = 4,
        latent_lr: float = 0.02,
        kl: float = 1e-5,
        pixels: bool = True,
        leak: bool = False,
    ) -> None:
        self.rows, self.fresh_rows, self.steps = rows, fresh_rows, steps
        self.latent_lr, self.kl, self.pixels, self.leak = latent_lr, kl, pixels, leak
        self.vae, self.teacher = vae, teacher
        self.generator = vae.decoder.eval()
        device = next(vae.parameters()).device
        on_gpu = device.type == "cuda"
        self.optimizer = torch.optim.Adam(vae.parameters(), lr=lr, fused=on_gpu or None, capturable=on_gpu)
        self.networks, self.optimizers, self.capturable = [vae], [self.optimizer], not leak
        self._z = torch.empty(rows, vae.latent_dim, device=device)
        self._noise = torch.empty(rows + fresh_rows, vae.latent_dim, device=device)

    @override
    def latents(self, stream: torch.Generator) -> Tensor:
        z = self._z.normal_(generator=stream)
        return self.tune_latents(z) if self.latent_lr else z

    def tune_latents(self, z: Tensor) -> Tensor:
        """Returns the latents (rows, latent_dim) after the first Adam step on :meth:`latent_loss`, z − lr·g / (|g| + ε)."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            loss = self.latent_loss(z)
            if self.leak:
                loss.backward(inputs=[z, *self.vae.decoder.parameters()])
                gradient = z.grad
            else:
                (gradient,) = torch.autograd.grad(loss, z)
        assert gradient is not None
        return z.detach() - self.latent_lr * gradient / (gradient.abs() + 1e-8)

    def latent_loss(self, z: Tensor) -> Tensor:
        """Returns CE(T(D(z)), argmax T(D(z))) + 5 Σ p̄ log p̄ + MSE(var z, 1) + MSE(mean z, 0), 0-d; moments are over the batch."""
        logits = self.teacher(self.generator(z))
        moments = (z.var(0) - 1).square().mean() + z.mean(0).square().mean() if len(z) > 1 else 0.0
        return one_hot(logits) + DIVERSITY * entropy(logits) + moments

    @override
    def learn(
        self, batch: Batch, step: int, stream: torch.Generator, autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> dict[str, Tensor]:
        if step >= self.steps:
            return {}
        fresh = batch.parts[0].rows
        # The first fresh samples, then all replayed ones.
        images = torch.cat([batch.images[: self.fresh_rows], batch.images[fresh:]])
        logits = torch.cat([batch.teacher_logits[: self.fresh_rows], batch.teacher_logits[fresh:]])
        self.vae.train()
        with autocast():
            loss = self.loss(images, logits, self._noise.normal_(generator=stream))
        loss.backward(inputs=list(self.vae.parameters()))
        distributed.average_([parameter.grad for parameter in self.vae.parameters() if parameter.grad is not None])
        self.optimizer.step()
        # After the step, not before: gradients that leak into the decoder until the next step must remain.
        self.optimizer.zero_grad()
        self.vae.eval()
        return {"vae": loss.detach()}

    def loss(self, images: Tensor, logits: Tensor, noise: Tensor) -> Tensor:
        """Returns L1(T(x̂), T(x)) + kl·KL(N(μ, σ²) ‖ N(0, I)), plus L1(x̂, x) if ``pixels`` is set, 0-d.

        Args:
            images: Images x, (B, C, H, W).
            logits: The teacher's logits T(x).
            noise: Samples of N(0, I), (B, latent_dim).
        """
        mean, log_variance = (output.float() if output.dtype.itemsize < 4 else output for output in self.vae.encode(images))
        reconstruction = self.vae.decoder(mean + noise * (log_variance / 2).exp())
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
        loss = l1_discrepancy(self.teacher(reconstruction), logits, reduction="mean") + self.kl * divergence
        return loss + F.l1_loss(reconstruction, images.to(reconstruction.dtype)) if self.pixels else loss

    @override
    def state_dict(self) -> dict[str, Any]:
        leaked = [parameter.grad for parameter in self.vae.decoder.parameters()]
        return {"vae": self.vae.state_dict(), "optimizer": self.optimizer.state_dict(), "leaked": leaked}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.vae.load_state_dict(state["vae"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # load_state_dict keeps references
        # The state may come from another type of device.
        for group in self.optimizer.param_groups:
            group |= {name: self.optimizer.defaults[name] for name in ("fused", "capturable")}
        if self.optimizer.defaults["capturable"]:
            for values in self.optimizer.state.values():
                values["step"] = values["step"].to(self._z.device)
        for parameter, leaked in zip(self.vae.decoder.parameters(), state["leaked"], strict=True):
            parameter.grad = None if leaked is None else leaked.to(parameter.device, copy=True)
