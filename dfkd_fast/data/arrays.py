"""Data sets stored as arrays: per split, uint8 images (N, H, W, C) and integer labels (N,)."""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from typing_extensions import override

from dfkd_fast.errors import DfkdError, first_line, short_repr

from .settings import DataSet, DataSettings, LoadContext, resolve_root
from .splits import ArrayBatches, ArraySplit, Augment, Split

__all__ = ["ArraySet", "digits", "npz", "torchvision_arrays"]

Arrays = tuple[np.ndarray, np.ndarray]
Reader = Callable[[Path, Split], Arrays]


@dataclass(frozen=True, kw_only=True)
class ArraySet(DataSet):
    """A data set whose splits are read into memory as arrays."""

    read: Reader
    """Function from the data set's path and a split to the images and labels."""

    can_hold_out: ClassVar[bool] = True

    @override
    def test_batches(self, settings: DataSettings, context: LoadContext) -> ArrayBatches:
        split = self.open_split(settings, "test", "none")
        return ArrayBatches(split.take(context.choose(len(split))), settings.batch_size)

    @override
    def open_split(self, settings: DataSettings, split: Split, augment: Augment) -> ArraySplit:
        if self.classes not in (None, settings.num_classes):
            raise DfkdError(f"data.num_classes is {settings.num_classes}, but {settings.name!r} has {self.classes} classes")
        source: Split = "train" if settings.holdout else split
        images, labels = self.read(resolve_root(settings), source)
        _check_arrays(images, labels, settings, source)
        if settings.holdout:
            indices = _with_holdout(len(images), settings.holdout, split)
            images, labels = images[indices], labels[indices]
        return ArraySplit(images, labels.astype(np.int64), settings.image_size, settings.mean, settings.std, augment=augment)


def _with_holdout(count: int, holdout: int, split: Split) -> np.ndarray:
    """Returns the indices of a split, out of ``count`` training images of which ``holdout`` are the test split, in rising order.

    Raises:
        DfkdError: no images would be left to train on.
    """
    if holdout >= count:
        raise DfkdError(f"data.holdout = {holdout}: must be less than {count}, the number of training images")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return (order[:holdout] if split == "test" else order[holdout:]).sort().values.numpy()


def _check_arrays(images: np.ndarray, labels: np.ndarray, settings: DataSettings, split: Split) -> None:
    where = f"data set {settings.name!r}, {split}:"
    if images.ndim != 4 or images.dtype != np.uint8 or 0 in images.shape[1:]:
        raise DfkdError(f"{where} images must be uint8 (N, H, W, C) with at least one pixel, not {images.dtype} {images.shape}")
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise DfkdError(f"{where} labels must be integers ({len(images)},), not {labels.dtype} {labels.shape}")
    if len(images) == 0:
        raise DfkdError(f"{where} there are no images")
    if images.shape[3] != settings.channels:
        raise DfkdError(f"{where} images have {images.shape[3]} channels, data.channels is {settings.channels}")
    if labels.min() < 0 or labels.max() >= settings.num_classes:
        raise DfkdError(f"{where} labels run from {labels.min()} to {labels.max()}, data.num_classes is {settings.num_classes}")


def digits(_: Path, split: Split) -> Arrays:
    """Returns a split of scikit-learn's 1,797 handwritten digits, 8 × 8 pixels; a fixed stratified quarter is the test split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.25, random_state=0, stratify=labels)
    indices = train if split == "train" else test
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    return images[indices], labels[indices]


def torchvision_arrays(name: str) -> Reader:
    """Returns a reader of the torchvision data set class ``name`` in torchvision's layout on disk."""

    def read(root: Path, split: Split) -> Arrays:
        from torchvision import datasets

        try:
            data = getattr(datasets, name)(str(root), train=split == "train", download=False)
        except (KeyError, AssertionError) as error:  # their messages mean nothing to a user
            reason = "a file has an invalid header, or its size does not match its header"
            raise DfkdError(f"data.root {root} does not hold {name} in torchvision's layout: {reason}") from error
        except (RuntimeError, OSError, EOFError, ValueError) as error:
            raise DfkdError(f"data.root {root} does not hold {name} in torchvision's layout: {first_line(error)}") from error
        images = np.asarray(data.data)
        return images if images.ndim == 4 else images[..., None], np.asarray(data.targets)

    return read


def npz(path: Path, split: Split) -> Arrays:
    """Returns the images, uint8 (N, H, W, C), and the labels, integers (N,), of an .npz file.

    They are called ``x_<split>`` and ``y_<split>``, as Keras does, or ``<split>_images`` and ``<split>_labels``, as MedMNIST does.
    Images (N, H, W) are grayscale, and labels may be (N, 1).
    """
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise DfkdError(f"data.root {path} cannot be read as an .npz file: {first_line(error)}") from error
    with archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        keys = (f"{split}_images", f"{split}_labels") if f"{split}_images" in names else (f"x_{split}", f"y_{split}")
        if missing := {*keys} - names:
            raise DfkdError(f"data.root {path} has no {', '.join(sorted(missing))}: its arrays are {short_repr(sorted(names))}")
        images, labels = (_member(archive, key) for key in keys)
    return images[..., None] if images.ndim == 3 else images, labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def _member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    try:
        with archive.open(f"{name}.npy") as file:
            # Not numpy.load, which takes anything else for a pickle and recommends allow_pickle=True.
            return np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # for damaged files, the parsers of zip files and arrays raise exceptions of any type
        raise DfkdError(f"data.root {archive.filename}, {name} cannot be read as an array: {first_line(error)}") from error
