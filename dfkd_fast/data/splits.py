"""One split of a data set, as batches in the teacher's normalised space."""

import abc
import copy
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from dfkd_fast.errors import DfkdError

__all__ = ["ArrayBatches", "ArraySplit", "Augment", "SegmentationBatches", "SegmentationDataset", "Split", "batches"]

Split = Literal["train", "test"]
Augment = Literal["none", "shift", "shift_flip"]
Batch = tuple[Tensor, Tensor]


class InMemory(Dataset[Batch], abc.ABC):
    """Images that fit in memory, served a whole batch at a time."""

    @abc.abstractmethod
    def __getitems__(self, indices: list[int]) -> Batch: ...

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]


class ArraySplit(InMemory):
    """Images with a label each.

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
            from torchvision.transforms.v2.functional import resize

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


class SegmentationDataset(InMemory):
    """Images with a label a pixel.

    Args:
        images: uint8 (C, H, W) each, of any sizes.
        labels: integers (H, W) each.
        mean, std: constants of the normalisation, one a channel, of images in [0, 1].
        crop: side in pixels of the squares that are served, at most the shortest side of an image; None for whole images,
            which one batch must have of one size.
        augment: "none" crops in the middle, "shift" anywhere, "shift_flip" also mirrors half of the images.
    """

    def __init__(
        self,
        images: Sequence[Tensor],
        labels: Sequence[Tensor],
        mean: Sequence[float],
        std: Sequence[float],
        *,
        crop: int | None = None,
        augment: Augment = "none",
    ) -> None:
        self.images, self.labels = images, labels
        self.mean = torch.tensor(mean)[:, None, None]
        self.std = torch.tensor(std)[:, None, None]
        self.crop, self.augment = crop, augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> Batch:
        windows = self._windows(indices)
        images = torch.stack([self.images[index][:, rows, columns] for index, (rows, columns) in zip(indices, windows, strict=True)])
        labels = torch.stack([self.labels[index][rows, columns] for index, (rows, columns) in zip(indices, windows, strict=True)])
        if self.augment == "shift_flip":
            mirrored = torch.rand(len(indices)) < 0.5
            images[mirrored], labels[mirrored] = images[mirrored].flip(-1), labels[mirrored].flip(-1)
        return (images.float() / 255 - self.mean) / self.std, labels.long()

    def _windows(self, indices: list[int]) -> list[tuple[slice, slice]]:
        """The rows and columns of each image that are served."""
        if self.crop is None:
            return [(slice(None), slice(None))] * len(indices)
        spare = torch.tensor([self.labels[index].shape for index in indices]) - self.crop
        corners = spare // 2 if self.augment == "none" else (torch.rand(spare.shape) * (spare + 1)).long()
        return [(slice(top, top + self.crop), slice(left, left + self.crop)) for top, left in corners.tolist()]


def batches(
    split: Dataset[Any],
    batch_size: int,
    *,
    shuffle: bool = False,
    workers: int = 0,
    generator: torch.Generator | None = None,
) -> DataLoader[Any]:
    """A loader of (images (B, C, H, W) float32, labels (B,) or (B, H, W)); the last batch may be smaller.

    It draws from ``generator`` alone, so that evaluating never moves another random stream. Shuffled batches are to train on:
    a last one of a single image, whose batch norms would have nothing to normalise by, is left out.
    """
    alone = shuffle and len(split) % batch_size == 1  # type: ignore[arg-type]
    return _Loader(
        split,
        batch_size,
        shuffle=shuffle,
        drop_last=alone,
        num_workers=0 if isinstance(split, InMemory) else workers,
        collate_fn=_as_is if isinstance(split, InMemory) else _collate,
        generator=generator if generator is not None else torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )


class _Loader(DataLoader[Any]):
    """Raises the errors that it is served, for a worker process would wrap them, and leaves out batches of nothing."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            if isinstance(batch, DfkdError):
                raise batch
            if len(batch):
                yield batch


def _collate(served: Any) -> Any:
    return default_collate(served) if isinstance(served, list) and served else served


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


class SegmentationBatches:
    """Whole images in batches of one size each: those of a size as they come, sizes as they first come.

    Args:
        split: serves whole images.
        batch_size: images at a time; the last of a size may be fewer.
        unreadable: files that could not be decoded, and why.
    """

    def __init__(self, split: SegmentationDataset, batch_size: int, unreadable: list[str]) -> None:
        self.count = len(split) + len(unreadable)
        self.unreadable = unreadable
        sizes: dict[torch.Size, list[int]] = {}
        for index, labels in enumerate(split.labels):
            sizes.setdefault(labels.shape, []).append(index)
        self.loader = DataLoader(
            split,
            batch_sampler=[alike[start : start + batch_size] for alike in sizes.values() for start in range(0, len(alike), batch_size)],
            collate_fn=_as_is,
            generator=torch.Generator(),
            pin_memory=torch.cuda.is_available(),
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.loader)


def _as_is(batch: Any) -> Any:
    return batch
