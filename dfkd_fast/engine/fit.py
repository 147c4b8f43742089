"""Whether networks fit each other, found out before hours are spent."""

import torch
from torch import Tensor, nn

from dfkd_fast.errors import DfkdError, first_line
from dfkd_fast.models import evaluating, logits_of

__all__ = ["check_classifier", "check_networks"]


def check_classifier(name: str, network: nn.Module, images: Tensor, source: str) -> torch.Size:
    """Shape of a network's logits for one image: (classes,), or (classes, H, W) of a segmenter.

    Args:
        name: what to call it in errors.
        network: images (B, C, H, W) → logits.
        images: a small batch, on the network's device.
        source: whose images they are.

    Raises:
        DfkdError: it cannot take them, or does not return a tensor.
    """
    try:
        with evaluating(network):
            output = network(images)
    except (RuntimeError, ValueError) as error:
        size = "×".join(map(str, images.shape[1:]))
        raise DfkdError(f"the {name} cannot take {source} {size} images: {first_line(error)}") from error
    try:
        return logits_of(output).shape[1:]
    except DfkdError as error:
        raise DfkdError(f"the {name} {error}") from error


def check_networks(teacher: nn.Module, student: nn.Module, generator: nn.Module, device: torch.device) -> tuple[torch.Size, torch.Size]:
    """Shapes of one generated image and of its logits, once all three networks were seen to fit each other.

    Raises:
        DfkdError: they do not.
    """
    latent_dim = getattr(generator, "latent_dim", None)
    if not isinstance(latent_dim, int):
        raise DfkdError("the generator must have an integer attribute latent_dim: the size of z")
    with evaluating(generator):
        images = generator(torch.zeros(2, latent_dim, device=device))
    taught = check_classifier("teacher", teacher, images, "the generator's")
    learnt = check_classifier("student", student, images, "the generator's")
    if taught != learnt:
        raise DfkdError(
            f"teacher and student disagree on the classes: the teacher gives {tuple(taught)} logits an image, the student {tuple(learnt)}"
        )
    return images.shape[1:], taught
