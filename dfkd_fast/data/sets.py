"""The data sets a recipe can name, in the layouts users have them on disk. Nothing is downloaded."""

import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from torch.utils.data import Dataset

from dfkd_fast.errors import DfkdError, first_line
from dfkd_fast.settings import Count, Number, Positive, PositiveInt, settings

from .splits import ArraySplit, Augment

__all__ = ["DataSettings", "Split", "open_split"]

Split = Literal["train", "test"]
Arrays = tuple[np.ndarray, np.ndarray]


@settings
class DataSettings:
    """Recipe section ``[data]``: what images the teacher takes, and where labelled ones are for testing."""

    name: Literal["digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "npz", "folder", "none"] = "digits"
    """``npz``: a file with x_train, y_train, x_test, y_test, uint8 NHWC. ``folder``: train/ and val/ (or test/)
    with one folder a class. ``none``: no data at all, nothing is evaluated."""
    root: str = ""
    """Folder (or .npz file) with the data, in torchvision's layout; not needed for ``digits`` and ``none``."""
    num_classes: Annotated[int, Field(strict=True, ge=2)] = 10
    channels: PositiveInt = 1
    image_size: Annotated[int, Field(strict=True, ge=8)] = 32
    """Side of the teacher's input in pixels."""
    mean: tuple[Number, ...] = (0.5,)
    std: tuple[Positive, ...] = (0.5,)
    """Normalisation of images in [0, 1], one number a channel."""
    batch_size: PositiveInt = 1000
    """Images at a time in evaluation."""
    workers: Count = 0
    """Loader processes for ``folder``."""

    def __post_init__(self) -> None:
        for name, constants in (("mean", self.mean), ("std", self.std)):
            if len(constants) != self.channels:
                raise ValueError(f"{name} has {len(constants)} numbers for {self.channels} channels")


def open_split(wanted: DataSettings, split: Split, *, augment: Augment = "none") -> Dataset[Any]:
    """One split, giving images (C, H, W) normalised as the teacher expects them, and labels.

    Raises:
        DfkdError: the data is not where ``data.root`` says, or is not what its name promises.
    """
    if wanted.name == "none":
        raise DfkdError("data.name is 'none': this recipe has no images to read")
    if wanted.name == "folder":
        return _folder(wanted, split, augment)
    images, labels = ARRAYS[wanted.name](wanted, split)
    _check(images, labels, wanted, split)
    return ArraySplit(images, labels, wanted.image_size, wanted.mean, wanted.std, augment=augment)


def _digits(_: DataSettings, split: Split) -> Arrays:
    """scikit-learn's 1,797 scans of handwritten digits: a quarter, stratified and always the same, is held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.25, random_state=0, stratify=labels)
    chosen = train if split == "train" else test
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    return images[chosen], labels[chosen]


def _torchvision(name: str) -> Callable[[DataSettings, Split], Arrays]:
    def read(wanted: DataSettings, split: Split) -> Arrays:
        from torchvision import datasets

        root = _root(wanted)
        try:
            data = getattr(datasets, name)(str(root), train=split == "train", download=False)
        except (RuntimeError, OSError, EOFError, ValueError, AssertionError) as error:
            raise DfkdError(f"data.root {root} does not hold {name} in torchvision's layout: {first_line(error)}") from error
        images = np.asarray(data.data)
        return images if images.ndim == 4 else images[..., None], np.asarray(data.targets)

    return read


def _npz(wanted: DataSettings, split: Split) -> Arrays:
    path = _root(wanted)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = {f"x_{split}", f"y_{split}"} - set(arrays)
            if missing:
                raise DfkdError(f"data.root {path} lacks {', '.join(sorted(missing))}: it has {', '.join(sorted(arrays))}")
            return arrays[f"x_{split}"], arrays[f"y_{split}"]
    except DfkdError:
        raise
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DfkdError(f"data.root {path} is not an .npz file that can be read: {first_line(error)}") from error


ARRAYS: dict[str, Callable[[DataSettings, Split], Arrays]] = {
    "digits": _digits,
    "mnist": _torchvision("MNIST"),
    "fashion-mnist": _torchvision("FashionMNIST"),
    "cifar10": _torchvision("CIFAR10"),
    "cifar100": _torchvision("CIFAR100"),
    "npz": _npz,
}


def _folder(wanted: DataSettings, split: Split, augment: Augment) -> Dataset[Any]:
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    if wanted.channels not in (1, 3):
        raise DfkdError(f"data.channels is {wanted.channels}: images in folders have 1 or 3")
    root = _root(wanted)
    names = ("train",) if split == "train" else ("val", "test")
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None:
        raise DfkdError(f"data.root {root} has no folder {' or '.join(names)}")
    size = wanted.image_size
    if augment == "none":
        view = [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)]
    else:
        flip = [transforms.RandomHorizontalFlip()] if augment == "shift_flip" else []
        view = [transforms.RandomResizedCrop(size), *flip]
    colour = [transforms.Grayscale()] if wanted.channels == 1 else []
    end = [transforms.ToTensor(), transforms.Normalize(wanted.mean, wanted.std)]
    try:
        data = ImageFolder(str(folder), transforms.Compose([*view, *colour, *end]))
    except (FileNotFoundError, RuntimeError) as error:
        raise DfkdError(f"data.root {folder} holds no image folders: {first_line(error)}") from error
    if len(data.classes) != wanted.num_classes:
        raise DfkdError(f"data.num_classes is {wanted.num_classes}, but {folder} has {len(data.classes)} classes")
    return data


def _root(wanted: DataSettings) -> Path:
    if not wanted.root:
        raise DfkdError(f"data set {wanted.name!r} needs --data-root (or data.root): the folder that holds it; nothing is downloaded")
    root = Path(wanted.root).expanduser()
    if not root.exists():
        raise DfkdError(f"data.root {root} does not exist")
    return root


def _check(images: np.ndarray, labels: np.ndarray, wanted: DataSettings, split: Split) -> None:
    where = f"data set {wanted.name!r}, {split}:"
    if images.ndim != 4 or images.dtype != np.uint8:
        raise DfkdError(f"{where} images must be uint8 (N, H, W, C), not {images.dtype} {images.shape}")
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise DfkdError(f"{where} labels must be integers ({len(images)},), not {labels.dtype} {labels.shape}")
    if len(images) == 0:
        raise DfkdError(f"{where} there are no images")
    if images.shape[3] != wanted.channels:
        raise DfkdError(f"{where} images have {images.shape[3]} channels, data.channels is {wanted.channels}")
    if labels.min() < 0 or labels.max() >= wanted.num_classes:
        raise DfkdError(f"{where} labels run from {labels.min()} to {labels.max()}, data.num_classes is {wanted.num_classes}")
