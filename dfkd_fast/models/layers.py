"""Layers of the generators that PyTorch does not have."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dfkd_fast.surgery import SpectralNorm

__all__ = ["CheckpointedStage", "Standardize", "UpsampleConv2d"]


class UpsampleConv2d(nn.Conv2d):
    """Nearest ×2 upsampling and a 3×3 convolution with padding 1, computed as one transposed convolution.

    Both operations together equal a stride-2 transposed convolution whose 4×4 kernel is the 3×3 kernel summed over 2×2 windows
    and flipped. It takes 2.25 × fewer multiplications and stores no upsampled tensor. The parameters are those of the 3×3
    convolution.

    Shape: (B, in_channels, H, W) → (B, out_channels, 2H, 2W).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padded = F.pad(weight, (1, 1, 1, 1))
        row_sums = padded[:, :, :-1] + padded[:, :, 1:]
        kernel = (row_sums[..., :-1] + row_sums[..., 1:]).flip(2, 3).transpose(0, 1)
        if weight.is_contiguous(memory_format=torch.channels_last):
            # The output takes the kernel's memory format; a contiguous kernel would make all following layers run in NCHW.
            kernel = kernel.contiguous(memory_format=torch.channels_last)
        return F.conv_transpose2d(input, kernel, bias, stride=2, padding=1)


class CheckpointedStage(nn.Sequential):
    """A ``Sequential`` with optional activation checkpointing that updates running statistics once per step.

    Args:
        checkpointing: recompute the activations in the backward pass instead of storing them.
        layers: the layers, in order.
    """

    def __init__(self, checkpointing: bool, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        if not self.checkpointing or not torch.is_grad_enabled():
            return self._run_layers(x)
        if torch.compiler.is_compiling():
            # Dynamo does not support context_fn. Batch norms work without it, since the compiled graph updates their statistics once.
            # Dynamo cannot trace the buffer updates of spectral norms inside a checkpoint, so such a stage stores its activations.
            has_spectral_norm = any(isinstance(module, SpectralNorm) for module in self.modules())
            return (
                self._run_layers(x) if has_spectral_norm else checkpoint(self._run_layers, x, use_reentrant=False, preserve_rng_state=False)
            )
        # No layer draws random numbers, so the RNG state need not be saved.
        return checkpoint(
            self._run_layers, x, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: (nullcontext(), self._recomputation())
        )

    def _run_layers(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x

    @contextmanager
    def _recomputation(self) -> Iterator[None]:
        """Restores the buffers after the recomputation and disables power iterations during it."""
        buffers = [(buffer, buffer.clone()) for buffer in self.buffers()]
        # Another power iteration would change the weights between forward pass and recomputation.
        norms = [module for module in self.modules() if isinstance(module, SpectralNorm) and module.training]
        for norm in norms:
            norm.training = False
        try:
            yield
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)
            for norm in norms:
                norm.training = True


class Standardize(nn.Module):
    """Normalizes images in [0, 1] to the teacher's input space: (x − mean) / std with per-channel constants.

    Shape: (N, C, H, W) → (N, C, H, W).

    Args:
        mean, std: C numbers each.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.constants = (tuple(mean), tuple(std))
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean[:, None, None]) / self.std[:, None, None]
