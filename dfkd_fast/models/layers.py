"""The layers that generators are built of, beside PyTorch's."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dfkd_fast.surgery import SpectralNorm

__all__ = ["CheckpointedStage", "Standardize", "UpsampleConv2d"]


class UpsampleConv2d(nn.Conv2d):
    """Nearest ×2 upsampling, then a 3×3 convolution with padding 1, as one transposed convolution.

    Upsampling followed by a 3×3 kernel touches every input pixel through 2×2 copies, so both together are
    a stride-2 transposed convolution whose 4×4 kernel is the 3×3 one summed over a 2×2 window and
    flipped: 2.25 × fewer multiplications and no upsampled tensor. Parameters are those of the 3×3 layer.

    Shape: (B, in_channels, H, W) → (B, out_channels, 2H, 2W).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight  # once: every look at it is a power iteration of a spectral norm
        padded = F.pad(weight, (1, 1, 1, 1))
        summed = padded[:, :, :-1] + padded[:, :, 1:]
        kernel = (summed[..., :-1] + summed[..., 1:]).flip(2, 3).transpose(0, 1)
        if weight.is_contiguous(memory_format=torch.channels_last):
            # The layout of a convolution is that of its kernel; without this everything behind it would run in NCHW.
            kernel = kernel.contiguous(memory_format=torch.channels_last)
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)


class CheckpointedStage(nn.Sequential):
    """Layers whose activations are, on request, computed again for the backward pass; running statistics move once all the same."""

    def __init__(self, checkpointing: bool, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        if not self.checkpointing or not torch.is_grad_enabled():
            return self._run(x)
        if torch.compiler.is_compiling():
            # Dynamo takes no context_fn. Batch norms need none: their statistics leave the compiled graph once. Spectral norms replace
            # their vectors, which it does not trace inside a checkpoint: such a stage keeps its activations.
            spectral = any(isinstance(module, SpectralNorm) for module in self.modules())
            return self._run(x) if spectral else checkpoint(self._run, x, use_reentrant=False, preserve_rng_state=False)
        # No layer is random: nothing of the random state is kept.
        return checkpoint(
            self._run, x, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: (nullcontext(), self._second_run())
        )

    def _run(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x

    @contextmanager
    def _second_run(self) -> Iterator[None]:
        buffers = [(buffer, buffer.clone()) for buffer in self.buffers()]
        # Another power iteration would give other weights than the first run had.
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
    """(x − mean) / std, a constant of each a channel: from pixels in [0, 1] to the teacher's normalised space."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.constants = (tuple(mean), tuple(std))
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean[:, None, None]) / self.std[:, None, None]
