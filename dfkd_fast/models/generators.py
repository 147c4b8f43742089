"""Generators: modules from latent vectors to images in the teacher's normalized input space."""

import itertools
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from dfkd_fast.errors import DfkdError
from dfkd_fast.settings import Flag, NonNegative, Positive, PositiveInt, settings
from dfkd_fast.surgery import keep_spectral_norms_in_float32

from .layers import CheckpointedStage, Standardize, UpsampleConv2d

__all__ = [
    "Generator",
    "GeneratorA",
    "GeneratorB",
    "GeneratorC",
    "GeneratorD",
    "GeneratorSettings",
    "build_generator",
]


@settings
class GeneratorSettings:
    """Recipe section ``[generator]``."""

    model: Literal["A", "B", "C", "D"] = "A"
    """Architecture: A and B are DFAD's, C is that of MAD's CIFAR runs, D is for images of 64 to 256 pixels."""
    latent_dim: PositiveInt = 100
    """Dimension of the latent vectors z ~ N(0, I)."""
    width: PositiveInt = 64
    """Channels of the last hidden layer (``ngf`` in DFAD's code)."""
    conditional: Flag = False
    """Add a learned class embedding e_y to z (MAD)."""
    spectral_norm: Flag = False
    """Apply spectral normalization to the convolutions (PRE-DFKD)."""
    hidden_eps: Positive = 1e-5
    """``eps`` of the hidden batch norms. PRE-DFKD's public code uses 0.8, passed in the position of ``eps`` where a momentum was meant."""
    image_size: Annotated[int, Field(strict=True, ge=0, le=2**14)] = 0
    """Height and width of the images, in pixels; 0 for ``data.image_size``. Convolutional networks learn from smaller images than they are
    evaluated on."""
    checkpointing: Flag = False
    """Activation checkpointing, generator D only: recompute activations in the backward pass to save memory."""
    uniform_init: NonNegative = 0.0
    """Initialize all weights of convolutions and linear layers from U(−u, u) (u = 0.08 in PRE-DFKD); 0 keeps the architecture's
    default initialization."""


class Generator(nn.Module):
    """A body from z to pre-activations, followed by an activation and an optional normalization.

    Activation and normalization are separate from the body so that :func:`generate` can fuse them over several generators;
    ``forward`` is the unfused reference.

    Shape: (B, latent_dim) → (B, C, H, W).

    Args:
        body: module from z (B, latent_dim) to pre-activations (B, C, H, W).
        latent_dim: dimension of z.
        output_norm: ``BatchNorm2d(C, affine=False)`` or :class:`Standardize`, applied after the activation; None for none.
        activation: output activation.
    """

    embedding: nn.Embedding | None
    """Class embedding (num_classes, latent_dim) of a conditional generator, added to z by :func:`condition_latents`; else None."""

    def __init__(
        self, body: nn.Module, latent_dim: int, output_norm: nn.Module | None, activation: Literal["tanh", "sigmoid"] = "tanh"
    ) -> None:
        super().__init__()
        self.embedding = None
        self.body = body
        self.latent_dim = latent_dim
        self.activation: Literal["tanh", "sigmoid"] = activation
        self.output_norm = output_norm

    def forward(self, z: Tensor) -> Tensor:
        images = self.body(z).tanh() if self.activation == "tanh" else self.body(z).sigmoid()
        return images if self.output_norm is None else self.output_norm(images)


def _upsampling_body(latent_dim: int, widths: tuple[int, int, int], channels: int, image_size: int) -> nn.Sequential:
    """Returns a linear layer to image_size/4 followed by two ×2 upsampling stages: (B, latent_dim) → (B, channels, H, W)."""
    if image_size % 4:
        raise DfkdError(f"generators A and C need an image_size that is a multiple of 4, not {image_size}")
    side, (first, second, last) = image_size // 4, widths
    return nn.Sequential(
        nn.Linear(latent_dim, first * side**2),
        nn.Unflatten(1, (first, side, side)),
        nn.BatchNorm2d(first),
        UpsampleConv2d(first, second),
        nn.BatchNorm2d(second),
        nn.LeakyReLU(0.2, inplace=True),
        UpsampleConv2d(second, last),
        nn.BatchNorm2d(last),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(last, channels, kernel_size=3, padding=1),
    )


class GeneratorA(Generator):
    """DFAD's generator for small images (arXiv 1912.11006): upsampling and convolutions, tanh, batch norm.

    Args:
        latent_dim: dimension of z.
        channels: number of channels of the images.
        image_size: height and width of the images in pixels, a multiple of 4.
        width: channels of the last hidden layer (64 in the paper); the first two have twice as many.
    """

    def __init__(self, latent_dim: int, channels: int, image_size: int, width: int = 64) -> None:
        body = _upsampling_body(latent_dim, (2 * width, 2 * width, width), channels, image_size)
        super().__init__(body, latent_dim, nn.BatchNorm2d(channels, affine=False))


class GeneratorB(Generator):
    """DFAD's generator for larger images (arXiv 1912.11006): transposed convolutions, tanh.

    Weights are initialized from N(0, 0.02²), batch norm weights from N(1, 0.02²).

    Args:
        latent_dim: dimension of z.
        channels: number of channels of the images.
        image_size: height and width of the images in pixels: 16, 32, 64, 128 (in the paper) or 256.
        width: channels of the last hidden layer (64 in the paper); the first has eight times as many.
    """

    def __init__(self, latent_dim: int, channels: int, image_size: int, width: int = 64) -> None:
        if image_size not in (16, 32, 64, 128, 256):
            raise DfkdError(f"generator B needs an image_size of 16, 32, 64, 128 or 256, not {image_size}")
        side = image_size // 16
        first = 8 * width
        widths = [first, 4 * width, 2 * width, width, width]
        layers: list[nn.Module] = [
            nn.Linear(latent_dim, first * side**2),
            nn.Unflatten(1, (first, side, side)),
            nn.BatchNorm2d(first),
        ]
        for in_channels, out_channels in itertools.pairwise(widths):
            layers += [
                nn.ConvTranspose2d(in_channels, out_channels, kernel_size=4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        layers.append(nn.Conv2d(width, channels, kernel_size=3, padding=1))
        super().__init__(nn.Sequential(*layers), latent_dim, output_norm=None)
        self.apply(_init_normal)


class GeneratorC(Generator):
    """Generator of the CMI benchmark (arXiv 2105.08584), used by MAD on CIFAR: sigmoid, then normalization by data set constants.

    Args:
        latent_dim: dimension of z.
        image_size: height and width of the images in pixels, a multiple of 4.
        mean, std: per-channel normalization constants of the teacher's training data.
        width: channels of the last hidden layer (64 in the preset); the first has four times as many.
    """

    def __init__(self, latent_dim: int, image_size: int, mean: Sequence[float], std: Sequence[float], width: int = 64) -> None:
        body = _upsampling_body(latent_dim, (4 * width, 2 * width, width), len(mean), image_size)
        super().__init__(body, latent_dim, Standardize(mean, std), "sigmoid")


class GeneratorD(Generator):
    """Generator for images of 64 to 256 pixels: a linear layer to 4 to 7 pixels, ×2 upsampling stages, sigmoid, normalization.

    Args:
        latent_dim: dimension of z.
        image_size: height and width of the images in pixels: 4, 5, 6 or 7 times a power of 2, such as 64, 112, 128, 224 or 256.
        mean, std: per-channel normalization constants of the teacher's training data.
        width: channels of the last hidden layer; each earlier layer has twice as many as the next one, up to 8 · width.
        checkpointing: do not store the activations inside a stage; recompute them in the backward pass.
    """

    def __init__(
        self, latent_dim: int, image_size: int, mean: Sequence[float], std: Sequence[float], width: int = 64, checkpointing: bool = False
    ) -> None:
        side, doublings = image_size, 0
        while side > 7 and side % 2 == 0:
            side, doublings = side // 2, doublings + 1
        if not 4 <= side <= 7 or doublings < 2:
            raise DfkdError(f"generator D needs an image_size of 4 to 7 times a power of 2, such as 64, 112, 128 or 224, not {image_size}")
        widths = [width * min(8, 2 ** (doublings - stage)) for stage in range(doublings + 1)]
        stages = [
            CheckpointedStage(
                checkpointing,
                UpsampleConv2d(in_channels, out_channels),
                nn.BatchNorm2d(out_channels),
                nn.LeakyReLU(0.2, inplace=True),
            )
            for in_channels, out_channels in itertools.pairwise(widths)
        ]
        body = nn.Sequential(
            nn.Linear(latent_dim, widths[0] * side**2),
            nn.Unflatten(1, (widths[0], side, side)),
            nn.BatchNorm2d(widths[0]),
            *stages,
            nn.Conv2d(width, len(mean), kernel_size=3, padding=1),
        )
        super().__init__(body, latent_dim, Standardize(mean, std), "sigmoid")


def _init_normal(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


def build_generator(
    config: GeneratorSettings,
    channels: int,
    image_size: int,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    num_classes: int | None = None,
) -> Generator:
    """Builds the generator of a recipe.

    Args:
        config: recipe section ``[generator]``.
        channels: number of channels of the images.
        image_size: height and width of the images in pixels, the teacher's input size.
        mean, std: per-channel normalization constants of the teacher's input, for generators C and D; 0 and 1 by default.
        num_classes: the teacher's number of classes; required for a conditional generator.

    Returns:
        A randomly initialized generator.

    Raises:
        DfkdError: the architecture does not support the image size or checkpointing, or ``num_classes`` is missing.
    """
    latent_dim, width = config.latent_dim, config.width
    generator: Generator
    if config.model == "A":
        generator = GeneratorA(latent_dim, channels, image_size, width)
    elif config.model == "B":
        generator = GeneratorB(latent_dim, channels, image_size, width)
    elif config.model == "C":
        generator = GeneratorC(latent_dim, image_size, mean or [0.0] * channels, std or [1.0] * channels, width)
    else:
        constants = mean or [0.0] * channels, std or [1.0] * channels
        generator = GeneratorD(latent_dim, image_size, *constants, width, config.checkpointing)
    if config.checkpointing and config.model != "D":
        raise DfkdError(f"generator.checkpointing: generator {config.model} does not support it, only D does")
    for layer in generator.body.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = config.hidden_eps
        elif isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            if config.uniform_init:
                nn.init.uniform_(layer.weight, -config.uniform_init, config.uniform_init)
            if config.spectral_norm and not isinstance(layer, nn.Linear):
                nn.utils.parametrizations.spectral_norm(layer)
    keep_spectral_norms_in_float32(generator)
    if config.conditional:
        if num_classes is None:
            raise DfkdError("generator.conditional = true needs the number of classes (num_classes)")
        generator.embedding = nn.Embedding(num_classes, latent_dim)
    return generator
