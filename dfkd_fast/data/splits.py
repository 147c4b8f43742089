"""One split of a data set, as batches in the teacher's normalised space."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import resize

__all__ = ["ArrayBatches", "ArraySplit", "Augment", "batches"]

Augment = Literal["none", "shift", "shift_flip"]
Batch = tuple[Tensor, Tensor]


class ArraySplit(Dataset[Batch]):
    """Images that fit in memory, served a whole batch at a time.

    Args:
        images: uint8 (N, H, W, C).
        labels: integers (N,).
        image_size: side to resize to, in pixels; resized once, here.
        mean, std: constants of the normalisation, one a channel, of images in [0, 1].
        augment: which random changes every image gets each time it is served.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        augment: Augment = "none",
    ) -> None:
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
        if pixels.shape[-2:] != (image_size, image_size):
            pixels = resize(pixels, [image_size, image_size], antialias=True)
        self.pixels = pixels.contiguous()
        self.labels = torch.from_numpy(np.ascontiguousarray(labels)).long()
        self.mean = torch.tensor(mean)[:, None, None]
        self.std = torch.tensor(std)[:, None, None]
        self.augment = augment

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int]) -> Self:
        """Some of the images."""
        taken = copy.copy(self)
        taken.pixels, taken.labels = self.pixels[list(indices)], self.labels[list(indices)]
        return taken

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        images = self.pixels[indices].float() / 255
        if self.augment != "none":
            images = shift(images, flip=self.augment == "shift_flip")
        return (images - self.mean) / self.std, self.labels[indices]


def shift(images: Tensor, *, flip: bool, pixels: int = 4) -> Tensor:
    """Each image of (N, C, H, W) moved by up to ``pixels`` both ways, zeros coming in, and half of them mirrored.

    With ``flip``, the usual augmentation of CIFAR: a random crop of the padded image, a horizontal flip.
    """
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (pixels,) * 4)
    top, left = torch.randint(0, 2 * pixels + 1, (2, count, 1, 1))
    mirrored = (torch.rand(count, 1, 1) < 0.5) & flip
    rows = top + torch.arange(height)[:, None]
    columns = torch.arange(width).expand(count, 1, width)
    columns = left + torch.where(mirrored, width - 1 - columns, columns)
    return padded.permute(0, 2, 3, 1)[torch.arange(count)[:, None, None], rows, columns].permute(0, 3, 1, 2)


def batches(
    split: Dataset[Any],
    batch_size: int,
    *,
    shuffle: bool = False,
    workers: int = 0,
    generator: torch.Generator | None = None,
) -> DataLoader[Any]:
    """A loader of (images (B, C, H, W) float32, labels (B,)); the last batch may be smaller.

    It draws from ``generator`` alone, so that evaluating never moves another random stream.
    """
    return DataLoader(
        split,
        batch_size,
        shuffle=shuffle,
        num_workers=0 if isinstance(split, ArraySplit) else workers,
        collate_fn=_as_is if isinstance(split, ArraySplit) else None,
        generator=generator if generator is not None else torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )


class ArrayBatches:
    """Batches of images that fit in memory; the last may be smaller."""

    def __init__(self, split: ArraySplit, batch_size: int) -> None:
        self.count = len(split)
        self.unreadable: list[str] = []
        self.loader = batches(split, batch_size)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.loader)


def _as_is(batch: Any) -> Any:
    return batch
