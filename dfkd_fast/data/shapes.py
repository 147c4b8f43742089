"""A synthetic segmentation data set: coloured shapes on a noisy background."""

import numpy as np
import torch
from torch import Tensor

from .classes import SHAPES
from .splits import Split

__all__ = ["draw_shapes"]

COUNTS: dict[Split, int] = {"train": 512, "test": 128}
SHAPES_PER_IMAGE = 3


def draw_shapes(split: Split, size: int) -> tuple[Tensor, Tensor]:
    """Returns images of circles, squares and triangles with per-pixel labels; the same for every call.

    Later shapes cover earlier ones. The colour of a shape is its class's colour plus noise, so that colour identifies most shapes,
    and form identifies all.

    Args:
        split: ``train`` or ``test``.
        size: height and width of the images in pixels.

    Returns:
        Images, uint8 (N, 3, size, size), and labels, int16 (N, size, size).
    """
    count, rng = COUNTS[split], np.random.default_rng(list(COUNTS).index(split))
    colours = np.array(list(SHAPES.colours.values()), np.float32)
    steps = np.linspace(0, 1, size, dtype=np.float32)
    images = np.broadcast_to(rng.uniform(90, 170, (count, 1, 1, 1)).astype(np.float32), (count, size, size, 3))
    labels = np.zeros((count, size, size), np.int16)
    for _ in range(SHAPES_PER_IMAGE):
        kinds = rng.integers(1, len(colours), (count, 1, 1))
        left, top = rng.uniform(0.15, 0.85, (2, count, 1, 1)).astype(np.float32)
        radius = rng.uniform(0.12, 0.28, (count, 1, 1)).astype(np.float32)
        x, y = (steps - left) / radius, (steps[:, None] - top) / radius
        circle, square, triangle = x**2 + y**2 < 1, np.maximum(abs(x), abs(y)) < 0.85, (y < 0.8) & (2 * abs(x) < y + 1)
        inside = np.choose(kinds - 1, [circle, square, triangle])
        colour = colours[kinds] + rng.normal(0, 30, (count, 1, 1, 3)).astype(np.float32)
        images, labels = np.where(inside[..., None], colour, images), np.where(inside, kinds.astype(np.int16), labels)
    images = images + 12 * rng.standard_normal(images.shape, np.float32)
    return torch.from_numpy(images.clip(0, 255).astype(np.uint8)).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)
