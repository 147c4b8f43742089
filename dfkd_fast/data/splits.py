"""Splits of data sets, and batches of them in the teacher's normalized input space."""

import abc
import copy
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from dfkd_fast.errors import DfkdError

__all__ = [
    "MAX_SHIFT",
    "ArrayBatches",
    "ArraySplit",
    "Augment",
    "SegmentationBatches",
    "SegmentationDataset",
    "Split",
    "batches",
    "has_flips",
    "padding_mode",
]

Split = Literal["train", "test"]
Augment = Literal["none", "shift", "shift_flip", "reflect", "reflect_flip"]
Batch = tuple[Tensor, Tensor]
MAX_SHIFT = 4
"""Largest offset in pixels of augmented images."""


class InMemory(Dataset[Batch], abc.ABC):
    """Base class of data sets in memory, which return a whole batch at a time."""

    @abc.abstractmethod
    def __getitems__(self, indices: list[int]) -> Batch: ...

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]


class ArraySplit(InMemory):
    """Images with one label each, in memory.

    Args:
        images: uint8 (N, H, W, C).
        labels: integers (N,).
        image_size: height and width in pixels to which the constructor resizes the images.
        mean, std: per-channel normalization constants of images in [0, 1].
        augment: random augmentation at every access: "shift" by up to 4 pixels with black borders, "reflect" with reflected ones,
            "shift_flip" and "reflect_flip" also with horizontal flips.

    Raises:
        DfkdError: "reflect" or "reflect_flip" for images of 4 pixels or less.
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
        if image_size <= MAX_SHIFT and padding_mode(augment) == "reflect":
            raise DfkdError(f"teacher.augment = {augment!r}: needs images of more than {MAX_SHIFT} pixels, not {image_size}")
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
        """Returns the subset of the images with the given indices, in that order."""
        subset = copy.copy(self)
        subset.pixels, subset.labels = self.pixels[list(indices)], self.labels[list(indices)]
        return subset

    def __getitems__(self, indices: list[int]) -> Batch:
        images = self.pixels[indices].float() / 255
        if self.augment != "none":
            images = shift(images, flip=has_flips(self.augment), padding_mode=padding_mode(self.augment))
        return (images - self.mean) / self.std, self.labels[indices]


def has_flips(augment: Augment) -> bool:
    """Returns whether the augmentation mirrors images."""
    return augment.endswith("_flip")


def padding_mode(augment: Augment) -> Literal["constant", "reflect"]:
    """Returns how the borders of shifted images are filled: black or reflected."""
    return "reflect" if augment.startswith("reflect") else "constant"


def shift(images: Tensor, *, flip: bool, pixels: int = MAX_SHIFT, padding_mode: Literal["constant", "reflect"] = "constant") -> Tensor:
    """Shifts every image by a random offset of up to ``pixels`` in both directions.

    With ``flip``, this is the common CIFAR augmentation: a random crop of the zero-padded image and a horizontal flip.

    Args:
        images: (N, C, H, W), with H and W larger than ``pixels``.
        flip: mirror every image with probability 0.5.
        pixels: largest offset.
        padding_mode: fill borders with zeros, or with the reflection of the image.

    Returns:
        (N, C, H, W).
    """
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (pixels,) * 4, mode=padding_mode)
    top, left = torch.randint(0, 2 * pixels + 1, (2, count, 1, 1))
    mirrored = (torch.rand(count, 1, 1) < 0.5) & flip
    rows = top + torch.arange(height)[:, None]
    columns = torch.arange(width).expand(count, 1, width)
    columns = left + torch.where(mirrored, width - 1 - columns, columns)
    return padded.permute(0, 2, 3, 1)[torch.arange(count)[:, None, None], rows, columns].permute(0, 3, 1, 2)


class SegmentationDataset(InMemory):
    """Images with per-pixel labels, in memory.

    Args:
        images: uint8 (C, H, W) each; sizes may differ.
        labels: integers (H, W) each.
        mean, std: per-channel normalization constants of images in [0, 1].
        crop: height and width of the crops in pixels, at most the shortest side of an image; None for whole images, which must
            have the same size within a batch.
        augment: "none" for center crops, "shift" and "reflect" for random crops, "shift_flip" and "reflect_flip" for random crops and
            horizontal flips.
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
        if has_flips(self.augment):
            mirrored = torch.rand(len(indices)) < 0.5
            images[mirrored], labels[mirrored] = images[mirrored].flip(-1), labels[mirrored].flip(-1)
        return (images.float() / 255 - self.mean) / self.std, labels.long()

    def _windows(self, indices: list[int]) -> list[tuple[slice, slice]]:
        """Returns the rows and columns of the crop of each image."""
        if self.crop is None:
            return [(slice(None), slice(None))] * len(indices)
        margins = torch.tensor([self.labels[index].shape for index in indices]) - self.crop
        corners = margins // 2 if self.augment == "none" else (torch.rand(margins.shape) * (margins + 1)).long()
        return [(slice(top, top + self.crop), slice(left, left + self.crop)) for top, left in corners.tolist()]


def batches(
    split: Dataset[Any],
    batch_size: int,
    *,
    shuffle: bool = False,
    workers: int = 0,
    generator: torch.Generator | None = None,
) -> DataLoader[Any]:
    """Returns a data loader of float32 images (B, C, H, W) and labels (B,) or (B, H, W); the last batch may be smaller.

    Args:
        split: the data set.
        batch_size: number of images per batch.
        shuffle: shuffle the images at every pass, for training. A last batch of one image is dropped, since batch norms cannot be
            trained on it.
        workers: number of worker processes for data sets that are not in memory.
        generator: random number generator of the order; by default a new one, so that loading does not change the global
            random state.
    """
    drop_last = shuffle and len(split) % batch_size == 1  # type: ignore[arg-type]
    return _Loader(
        split,
        batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        num_workers=0 if isinstance(split, InMemory) else workers,
        collate_fn=_identity if isinstance(split, InMemory) else _collate,
        generator=generator if generator is not None else torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )


class _Loader(DataLoader[Any]):
    """Raises errors that are returned as a batch, because worker processes would wrap raised errors; skips empty batches."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            if isinstance(batch, DfkdError):
                raise batch
            if len(batch):
                yield batch


def _collate(samples: Any) -> Any:
    return default_collate(samples) if isinstance(samples, list) and samples else samples


class ArrayBatches:
    """Test batches of an :class:`ArraySplit`; the last batch may be smaller."""

    def __init__(self, split: ArraySplit, batch_size: int) -> None:
        self.count = len(split)
        self.unreadable: list[str] = []
        self.loader = batches(split, batch_size)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.loader)


class SegmentationBatches:
    """Test batches of whole images, grouped by size in the order in which the sizes first occur.

    Args:
        split: data set of whole images.
        batch_size: number of images per batch; the last batch of each size may be smaller.
        unreadable: files that could not be decoded, each with the reason.
    """

    def __init__(self, split: SegmentationDataset, batch_size: int, unreadable: list[str]) -> None:
        self.count = len(split) + len(unreadable)
        self.unreadable = unreadable
        sizes: dict[torch.Size, list[int]] = {}
        for index, labels in enumerate(split.labels):
            sizes.setdefault(labels.shape, []).append(index)
        self.loader = DataLoader(
            split,
            batch_sampler=[group[start : start + batch_size] for group in sizes.values() for start in range(0, len(group), batch_size)],
            collate_fn=_identity,
            generator=torch.Generator(),
            pin_memory=torch.cuda.is_available(),
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.loader)


def _identity(batch: Any) -> Any:
    return batch
