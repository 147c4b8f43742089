"""Preprocessing of images for evaluation: resize, center crop, normalization."""

from typing import Literal, NamedTuple

__all__ = ["EvalTransform", "Interpolation"]

Interpolation = Literal["bilinear", "bicubic"]


class EvalTransform(NamedTuple):
    """Parameters of torchvision's ``Resize(resize)``, ``CenterCrop(crop)``, ``ToTensor`` and ``Normalize(mean, std)``."""

    resize: int
    """Shorter side after resizing, in pixels."""
    crop: int
    """Height and width of the center crop, in pixels."""
    interpolation: Interpolation
    mean: tuple[float, ...]
    """Per-channel mean of images in [0, 1]."""
    std: tuple[float, ...]
    """Per-channel standard deviation of images in [0, 1]."""
