"""Generators: latent vectors in, images in the teacher's normalised space out."""

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast.errors import DfkdError
from dfkd_fast.kernels import concat_generated
from dfkd_fast.settings import PositiveInt, settings

__all__ = ["Generator", "GeneratorA", "GeneratorB", "GeneratorSettings", "UpsampleConv2d", "build_generator", "generate"]


@settings
class GeneratorSettings:
    """Recipe section ``[generator]``."""

    model: Literal["A", "B"] = "A"
    latent_dim: PositiveInt = 100
    """Size of z ~ N(0, I)."""
    width: PositiveInt = 64
    """Channels of the last hidden layer; DFAD's ``ngf``."""


class Generator(nn.Module):
    """A body from z to pre-activations, then tanh and, optionally, affine-free batch normalisation.

    The end is kept apart from the body so that :func:`generate` can fuse it over several generators;
    ``forward`` is the textbook form of the same thing.

    Args:
        body: (B, latent_dim) → (B, C, H, W).
        latent_dim: size of z.
        output_norm: ``BatchNorm2d(C, affine=False)`` behind the tanh, or None.
    """

    def __init__(self, body: nn.Module, latent_dim: int, output_norm: nn.BatchNorm2d | None) -> None:
        super().__init__()
        self.body = body
        self.latent_dim = latent_dim
        self.output_norm = output_norm

    def forward(self, z: Tensor) -> Tensor:
        images = self.body(z).tanh()
        return images if self.output_norm is None else self.output_norm(images)


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
        padded = F.pad(self.weight, (1, 1, 1, 1))
        summed = padded[:, :, :-1] + padded[:, :, 1:]
        kernel = summed[..., :-1] + summed[..., 1:]
        return F.conv_transpose2d(x, kernel.flip(2, 3).transpose(0, 1), self.bias, stride=2, padding=1)


class GeneratorA(Generator):
    """DFAD's generator for small images (arXiv 1912.11006): upsampling and convolutions, tanh, batch norm.

    Args:
        latent_dim: size of z.
        channels: of the images.
        image_size: side of the images in pixels, a multiple of 4.
        width: channels of the last hidden layer (64 in the paper); the first two have twice as many.
    """

    def __init__(self, latent_dim: int, channels: int, image_size: int, width: int = 64) -> None:
        if image_size % 4:
            raise DfkdError(f"generator A makes images whose side is a multiple of 4, not {image_size}")
        side = image_size // 4
        body = nn.Sequential(
            nn.Linear(latent_dim, 2 * width * side**2),
            nn.Unflatten(1, (2 * width, side, side)),
            nn.BatchNorm2d(2 * width),
            UpsampleConv2d(2 * width, 2 * width),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            UpsampleConv2d(2 * width, width),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, channels, kernel_size=3, padding=1),
        )
        super().__init__(body, latent_dim, nn.BatchNorm2d(channels, affine=False))


class GeneratorB(Generator):
    """DFAD's generator for larger images (arXiv 1912.11006): transposed convolutions, tanh.

    Weights are drawn from N(0, 0.02), batch norm gains from N(1, 0.02).

    Args:
        latent_dim: size of z.
        channels: of the images.
        image_size: side of the images in pixels: 16, 32, 64, 128 or 256. The paper's is 128.
        width: channels of the last hidden layer (64 in the paper); the first has eight times as many.
    """

    def __init__(self, latent_dim: int, channels: int, image_size: int, width: int = 64) -> None:
        if image_size not in (16, 32, 64, 128, 256):
            raise DfkdError(f"generator B makes images whose side is 16, 32, 64, 128 or 256, not {image_size}")
        side = image_size // 16
        first = 8 * width
        widths = [first, 4 * width, 2 * width, width, width]
        layers: list[nn.Module] = [
            nn.Linear(latent_dim, first * side**2),
            nn.Unflatten(1, (first, side, side)),
            nn.BatchNorm2d(first),
        ]
        for before, after in itertools.pairwise(widths):
            layers += [
                nn.ConvTranspose2d(before, after, kernel_size=4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(width, channels, kernel_size=3, padding=1))
        super().__init__(nn.Sequential(*layers), latent_dim, output_norm=None)
        self.apply(_draw_weights)


def _draw_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


def build_generator(wanted: GeneratorSettings, channels: int, image_size: int) -> Generator:
    """The generator of a recipe, for images of the teacher's input size."""
    generator = {"A": GeneratorA, "B": GeneratorB}[wanted.model]
    return generator(wanted.latent_dim, channels, image_size, wanted.width)


def generate(
    generators: Sequence[nn.Module],
    latents: Sequence[Tensor],
    *,
    out: Tensor | None = None,
    memory_format: torch.memory_format = torch.channels_last,
) -> Tensor:
    """One batch from several generators: their bodies, then activation, normalisation and concatenation in one go.

    Args:
        generators: :class:`Generator` that end alike are fused; any other modules from z to images are called.
        latents: one (B_i, latent_dim) tensor a generator.
        out: a preallocated batch (ΣB_i, C, H, W); only under ``torch.no_grad()``.
        memory_format: layout of a batch allocated here.

    Returns:
        Images (ΣB_i, C, H, W).
    """
    norms = _fusible_norms(generators)
    if norms is None:
        finished = [generator(z) for generator, z in zip(generators, latents, strict=True)]
        return concat_generated(finished, activation="none", normalize="none", out=out, memory_format=memory_format)

    raws = [generator.body(z) for generator, z in zip(generators, latents, strict=True)]  # type: ignore[operator]
    if not norms:
        return concat_generated(raws, activation="tanh", normalize="none", out=out, memory_format=memory_format)
    for norm in norms:
        if norm.training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
    return concat_generated(
        raws,
        activation="tanh",
        normalize="batch",
        running_means=[norm.running_mean for norm in norms if norm.running_mean is not None],
        running_vars=[norm.running_var for norm in norms if norm.running_var is not None],
        training=[norm.training for norm in norms],
        momentum=norms[0].momentum or 0.0,
        eps=norms[0].eps,
        out=out,
        memory_format=memory_format,
    )


def _fusible_norms(generators: Sequence[nn.Module]) -> list[nn.BatchNorm2d] | None:
    """The output norms of generators that end alike and as ``concat_generated`` can; None where they do not."""
    norms = []
    for generator in generators:
        if not isinstance(generator, Generator) or type(generator).forward is not Generator.forward:
            return None
        norm = generator.output_norm
        if norm is not None:
            if norm.affine or norm.momentum is None or norm.running_mean is None:
                return None
            norms.append(norm)
    alike = len(norms) in (0, len(generators)) and len({(norm.eps, norm.momentum) for norm in norms}) <= 1
    return norms if alike else None
