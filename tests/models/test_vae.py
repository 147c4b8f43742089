import pytest
import torch

from dfkd_fast import DfkdError
from dfkd_fast.models import Vae


@pytest.mark.parametrize(("latent_dim", "channels", "image_size", "width"), [(5, 1, 8, 2), (7, 3, 24, 3)])
def test_the_encoder_returns_mean_and_log_variance_and_the_decoder_images(
    latent_dim: int, channels: int, image_size: int, width: int
) -> None:
    torch.manual_seed(0)
    vae = Vae(latent_dim, channels, image_size, width)
    mean, log_variance = vae.encode(torch.randn(4, channels, image_size, image_size))
    assert mean.shape == log_variance.shape == (4, latent_dim)
    assert not torch.equal(mean, log_variance)
    assert vae.decoder(mean).shape == (4, channels, image_size, image_size)
    assert vae.decoder.latent_dim == vae.latent_dim == latent_dim


def test_parameters_at_the_papers_size() -> None:
    with torch.device("meta"):
        vae = Vae(latent_dim=1000, channels=3, image_size=32)
    for part, published in ((vae.encoder, 4.32e6), (vae.decoder, 8.42e6)):
        assert sum(parameter.numel() for parameter in part.parameters()) == pytest.approx(published, rel=0.005)


def test_mean_and_log_variance_depend_on_every_image_and_every_weight_of_the_encoder_has_a_gradient() -> None:
    torch.manual_seed(0)
    vae = Vae(5, 2, 16, 3)
    images = torch.randn(4, 2, 16, 16, requires_grad=True)
    for vector in vae.encode(images):
        (gradient,) = torch.autograd.grad(vector.square().sum(), images, retain_graph=True)
        assert gradient.flatten(1).any(1).all()
    sum(vector.square().sum() for vector in vae.encode(images)).backward()  # type: ignore[union-attr]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in vae.encoder.parameters())


@pytest.mark.parametrize("image_size", [28, 36])
def test_an_image_size_that_is_not_a_multiple_of_8_is_refused(image_size: int) -> None:
    with pytest.raises(DfkdError, match=f"multiple of 8, not {image_size}"):
        Vae(5, 1, image_size)
