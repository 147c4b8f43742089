"""How an image of any size becomes a network's input: resized, cropped in the middle, normalised."""

from typing import Literal, NamedTuple

__all__ = ["EvalTransform", "Interpolation"]

Interpolation = Literal["bilinear", "bicubic"]


class EvalTransform(NamedTuple):
    """What torchvision's ``Resize(resize)``, ``CenterCrop(crop)``, ``ToTensor`` and ``Normalize`` make of a PIL image."""

    resize: int
    """Pixels of the shorter side before the crop."""
    crop: int
    """Side of the square that is kept, in pixels."""
    interpolation: Interpolation
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """One a channel, of images in [0, 1]."""
