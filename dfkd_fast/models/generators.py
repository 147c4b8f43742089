"""Generators: latent vectors in, images in the teacher's normalised space out."""

import itertools
from collections.abc import Sequence
from typing import Literal

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
    """DFAD's two, the one that MAD's CIFAR runs start from, and one for 64 to 256 pixels."""
    latent_dim: PositiveInt = 100
    """Size of z ~ N(0, I)."""
    width: PositiveInt = 64
    """Channels of the last hidden layer; DFAD's ``ngf``."""
    conditional: Flag = False
    """Whether it is given z + e_y for a class y, e a learnt embedding (MAD)."""
    spectral_norm: Flag = False
    """Of the convolutions (PRE-DFKD)."""
    hidden_eps: Positive = 1e-5
    """Of the hidden batch norms. PRE-DFKD's public code has .8, passed where a momentum was meant."""
    checkpointing: Flag = False
    """Of generator D: save memory by computing activations twice."""
    uniform_init: NonNegative = 0.0
    """Draw all weights of convolutions and linear layers from U(−this, this) (PRE-DFKD: .08); 0 for the model's own way."""


class Generator(nn.Module):
    """A body from z to pre-activations, then an activation and, optionally, a normalisation.

    The end is kept apart from the body so that :func:`generate` can fuse it over several generators;
    ``forward`` is the textbook form of the same thing.

    Args:
        body: (B, latent_dim) → (B, C, H, W).
        latent_dim: size of z.
        output_norm: ``BatchNorm2d(C, affine=False)`` or :class:`Standardize` behind the activation, or None.
        activation: what bounds the pixels.
    """

    embedding: nn.Embedding | None
    """(classes, latent_dim), of a conditional generator: :func:`condition_latents` adds e_y to z."""

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
    """A linear layer to a quarter of the image's side, then twice as large, twice: (B, latent_dim) → (B, channels, H, W)."""
    if image_size % 4:
        raise DfkdError(f"generators A and C make images whose side is a multiple of 4, not {image_size}")
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
        latent_dim: size of z.
        channels: of the images.
        image_size: side of the images in pixels, a multiple of 4.
        width: channels of the last hidden layer (64 in the paper); the first two have twice as many.
    """

    def __init__(self, latent_dim: int, channels: int, image_size: int, width: int = 64) -> None:
        body = _upsampling_body(latent_dim, (2 * width, 2 * width, width), channels, image_size)
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
                nn.LeakyReLU(0.2, inplace=True),
            ]
        layers.append(nn.Conv2d(width, channels, kernel_size=3, padding=1))
        super().__init__(nn.Sequential(*layers), latent_dim, output_norm=None)
        self.apply(_draw_weights)


class GeneratorC(Generator):
    """The generator of the CMI benchmark (arXiv 2105.08584), from which MAD's CIFAR preset starts: sigmoid, data set constants.

    Args:
        latent_dim: size of z.
        image_size: side of the images in pixels, a multiple of 4.
        mean, std: of the data the teacher was trained on, a number a channel.
        width: channels of the last hidden layer (64 in the preset); the first has four times as many.
    """

    def __init__(self, latent_dim: int, image_size: int, mean: Sequence[float], std: Sequence[float], width: int = 64) -> None:
        body = _upsampling_body(latent_dim, (4 * width, 2 * width, width), len(mean), image_size)
        super().__init__(body, latent_dim, Standardize(mean, std), "sigmoid")


class GeneratorD(Generator):
    """For 64 to 256 pixels: from a square of 4 to 8 pixels by upsampling and convolutions, twice as large each time; sigmoid, constants.

    Args:
        latent_dim: size of z.
        image_size: side of the images in pixels: 4, 5, 6 or 7 times a power of 2, such as 64, 112, 128, 224 or 256.
        mean, std: of the data the teacher was trained on, a number a channel.
        width: channels of the last hidden layer; each before it has twice as many, up to eight times as many.
        checkpointing: keep no activations inside a stage, and compute them again for the backward pass.
    """

    def __init__(
        self, latent_dim: int, image_size: int, mean: Sequence[float], std: Sequence[float], width: int = 64, checkpointing: bool = False
    ) -> None:
        side, doublings = image_size, 0
        while side > 7 and side % 2 == 0:
            side, doublings = side // 2, doublings + 1
        if not 4 <= side <= 7 or doublings < 2:
            raise DfkdError(
                f"generator D makes images whose side is 4 to 7 times a power of 2, such as 64, 112, 128 or 224, not {image_size}"
            )
        widths = [width * min(8, 2 ** (doublings - stage)) for stage in range(doublings + 1)]
        stages = [
            CheckpointedStage(checkpointing, UpsampleConv2d(before, after), nn.BatchNorm2d(after), nn.LeakyReLU(0.2, inplace=True))
            for before, after in itertools.pairwise(widths)
        ]
        body = nn.Sequential(
            nn.Linear(latent_dim, widths[0] * side**2),
            nn.Unflatten(1, (widths[0], side, side)),
            nn.BatchNorm2d(widths[0]),
            *stages,
            nn.Conv2d(width, len(mean), kernel_size=3, padding=1),
        )
        super().__init__(body, latent_dim, Standardize(mean, std), "sigmoid")


def _draw_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


def build_generator(
    wanted: GeneratorSettings,
    channels: int,
    image_size: int,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    num_classes: int | None = None,
) -> Generator:
    """The generator of a recipe, for images of the teacher's input size.

    Args:
        wanted: what it is like.
        channels: of the images.
        image_size: side of the images in pixels.
        mean, std: of the teacher's input, for generators C and D; by default 0 and 1.
        num_classes: of the teacher, for a conditional generator.
    """
    latent_dim, width = wanted.latent_dim, wanted.width
    generator: Generator
    if wanted.model == "A":
        generator = GeneratorA(latent_dim, channels, image_size, width)
    elif wanted.model == "B":
        generator = GeneratorB(latent_dim, channels, image_size, width)
    elif wanted.model == "C":
        generator = GeneratorC(latent_dim, image_size, mean or [0.0] * channels, std or [1.0] * channels, width)
    else:
        constants = mean or [0.0] * channels, std or [1.0] * channels
        generator = GeneratorD(latent_dim, image_size, *constants, width, wanted.checkpointing)
    if wanted.checkpointing and wanted.model != "D":
        raise DfkdError(f"generator.checkpointing: generator {wanted.model} has none, only D has")
    for layer in generator.body.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = wanted.hidden_eps
        elif isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            if wanted.uniform_init:
                nn.init.uniform_(layer.weight, -wanted.uniform_init, wanted.uniform_init)
            if wanted.spectral_norm and not isinstance(layer, nn.Linear):
                nn.utils.parametrizations.spectral_norm(layer)
    keep_spectral_norms_in_float32(generator)
    if wanted.conditional:
        if num_classes is None:
            raise DfkdError("a conditional generator needs the number of classes")
        generator.embedding = nn.Embedding(num_classes, latent_dim)
    return generator
