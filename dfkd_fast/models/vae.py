"""PRE-DFKD's variational autoencoder."""

from torch import Tensor, nn

from dfkd_fast.errors import DfkdError

from .generators import GeneratorSettings, build_generator

__all__ = ["Vae"]


class Vae(nn.Module):
    """Variational autoencoder with a convolutional encoder to N(μ, σ²) and DFAD's generator A as decoder (PRE-DFKD, arXiv 2201.03019).

    Args:
        latent_dim: dimension of the latent vectors.
        channels: number of channels of the images.
        image_size: height and width of the images in pixels, a multiple of 8.
        width: channels of the encoder's first layer and of the decoder's last hidden layer (64 in the paper's code).
        hidden_eps, uniform_init: options of the decoder, see :class:`GeneratorSettings`.

    Raises:
        DfkdError: ``image_size`` is not a multiple of 8.
    """

    def __init__(
        self, latent_dim: int, channels: int, image_size: int, width: int = 64, *, hidden_eps: float = 1e-5, uniform_init: float = 0.0
    ) -> None:
        super().__init__()
        if image_size % 8:
            raise DfkdError(f"replay.kind = 'vae' needs an image_size that is a multiple of 8, not {image_size}")
        side = image_size // 8
        self.latent_dim = latent_dim
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, width, kernel_size=3, padding=1),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, 2 * width, kernel_size=3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Upsample(scale_factor=0.5),
            nn.Conv2d(2 * width, 2 * width, kernel_size=3, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.Upsample(scale_factor=0.5),
            nn.Flatten(),
            nn.Linear(2 * width * side**2, 2 * latent_dim),
        )
        decoder = GeneratorSettings(latent_dim=latent_dim, width=width, hidden_eps=hidden_eps, uniform_init=uniform_init)
        self.decoder = build_generator(decoder, channels, image_size)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes images (B, C, H, W) as a normal distribution; returns its mean and log-variance, (B, latent_dim) each."""
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        return mean, log_variance
