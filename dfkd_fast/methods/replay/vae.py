"""PRE-DFKD's replay: a variational autoencoder that is trained beside the student."""

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
"""Weight of the entropy of the mean prediction in the latents' tuning."""


@register("vae")
class VaeSettings(Policy):
    """Recipe section ``[replay.vae]`` (PRE-DFKD, arXiv 2201.03019)."""

    fp16 = False

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

    @property
    @override
    def smallest_batch(self) -> int:
        return self.fresh_rows

    @override
    def check(self, rows: int, batch_size: int) -> None:
        if self.fresh_rows > batch_size:
            raise ValueError(f"replay.vae.fresh_rows = {self.fresh_rows}: a batch has {batch_size} fresh rows")

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
    """Generative pseudo replay (PRE-DFKD, arXiv 2201.03019).

    The autoencoder learns fresh samples and some of its own, which keep it from forgetting, in the first student steps
    of every iteration. Replayed latents z ~ N(0, I) first take one step of Adam towards images the teacher is sure of, of
    all classes. The decoder is frozen there, in evaluation mode.

    Args:
        vae: encoder and decoder, on the device of the run.
        teacher: frozen; images → logits.
        rows: replayed samples a student step.
        fresh_rows: fresh samples that one of its steps learns from.
        lr: of its Adam.
        steps: of an iteration's student steps it learns in the first so many.
        latent_lr: of the step the latents take; 0 for none.
        kl: weight of the divergence from N(0, I), summed over the latent dimensions.
        pixels: reconstruct the images as well as what the teacher says of them. The paper does only the latter, its code both.
        leak: let the gradients of the latents' step go into the decoder's next update, as the public code does.
    """

    generator: nn.Module
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
        """Latents after one step of Adam on :meth:`latent_loss`: from no state that is z − lr·g / (|g| + ε)."""
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
        """CE(T(D(z)), own argmax) + 5 Σ p̄ log p̄ + MSE(var z, 1) + MSE(mean z, 0), moments over the batch; 0-d."""
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
        # The fresh samples' first rows, then all of its own.
        images = torch.cat([batch.images[: self.fresh_rows], batch.images[fresh:]])
        logits = torch.cat([batch.teacher_logits[: self.fresh_rows], batch.teacher_logits[fresh:]])
        self.vae.train()
        with autocast():
            loss = self.loss(images, logits, self._noise.normal_(generator=stream))
        loss.backward(inputs=list(self.vae.parameters()))
        distributed.average_([parameter.grad for parameter in self.vae.parameters() if parameter.grad is not None])
        self.optimizer.step()
        # After the step, not before: what leaks into the decoder until the next one stays there.
        self.optimizer.zero_grad()
        self.vae.eval()
        return {"vae": loss.detach()}

    def loss(self, images: Tensor, logits: Tensor, noise: Tensor) -> Tensor:
        """L1(T(x̂), T(x)) + L1(x̂, x) + 10⁻⁵·KL(N(μ, σ²) ‖ N(0, I)), the second if wanted; 0-d.

        Args:
            images: x, (B, C, H, W).
            logits: T(x).
            noise: N(0, I), (B, latent_dim).
        """
        mean, log_variance = (half.float() if half.dtype.itemsize < 4 else half for half in self.vae.encode(images))
        rebuilt = self.vae.decoder(mean + noise * (log_variance / 2).exp())
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
        loss = l1_discrepancy(self.teacher(rebuilt), logits, reduction="mean") + self.kl * divergence
        return loss + F.l1_loss(rebuilt, images.to(rebuilt.dtype)) if self.pixels else loss

    @override
    def state_dict(self) -> dict[str, Any]:
        leaked = [parameter.grad for parameter in self.vae.decoder.parameters()]
        return {"vae": self.vae.state_dict(), "optimizer": self.optimizer.state_dict(), "leaked": leaked}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.vae.load_state_dict(state["vae"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # it would keep the very tensors
        # The state may be of another kind of device.
        for group in self.optimizer.param_groups:
            group |= {name: self.optimizer.defaults[name] for name in ("fused", "capturable")}
        if self.optimizer.defaults["capturable"]:
            for values in self.optimizer.state.values():
                values["step"] = values["step"].to(self._z.device)
        for parameter, leaked in zip(self.vae.decoder.parameters(), state["leaked"], strict=True):
            parameter.grad = None if leaked is None else leaked.to(parameter.device, copy=True)
