"""The data sets a recipe can name, in the layouts users have them on disk. Nothing is downloaded."""

import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset

from dfkd_fast.errors import DfkdError, first_line
from dfkd_fast.settings import Count, Flag, Number, Positive, PositiveInt, settings

from .classes import classes_of
from .dali import DaliBatches, why_not_dali
from .folder import FolderBatches
from .listing import READERS, Listing, class_folders, read_listing
from .pairs import PUBLISHED, find_pairs, read_pairs
from .shapes import draw_shapes
from .splits import ArrayBatches, ArraySplit, Augment, PixelBatches, PixelSplit, Split
from .view import Interpolation, View

__all__ = ["Batches", "DataSettings", "Loader", "Split", "evaluation_batches", "label_names", "open_split", "palette"]

Loader = Literal["auto", "dali", "torchvision"]
Arrays = tuple[np.ndarray, np.ndarray]


@settings
class DataSettings:
    """Recipe section ``[data]``: what images the teacher takes, and where labelled ones are for testing."""

    name: Literal[
        "digits",
        "mnist",
        "fashion-mnist",
        "cifar10",
        "cifar100",
        "npz",
        "folder",
        "list",
        "imagenet",
        "places365",
        "shapes",
        "camvid",
        "nyuv2",
        "pairs",
        "none",
    ] = "digits"
    """``npz``: a file with x_train, y_train, x_test, y_test, uint8 NHWC. ``folder``: train/ and val/ (or test/)
    with one folder a class. ``list``: a text file of paths and classes, for testing only. ``none``: no data at all, nothing
    is evaluated. With a label a pixel: ``shapes``, a toy that needs no files; ``camvid`` (11 classes) and ``nyuv2`` (13);
    ``pairs``: folders of images and of label files, 0 to C − 1 or 255 for no label."""
    root: str = ""
    """Folder (or .npz file) with the data, in torchvision's layout; not needed for ``digits``, ``shapes`` and ``none``."""
    num_classes: Annotated[int, Field(strict=True, ge=2, le=1_000_000)] = 10
    channels: PositiveInt = 1
    image_size: Annotated[int, Field(strict=True, ge=8)] = 32
    """Side of the teacher's input in pixels; with a label a pixel, of what it is trained on: tests show whole images."""
    mean: tuple[Number, ...] = (0.5,)
    std: tuple[Positive, ...] = (0.5,)
    """Normalisation of images in [0, 1], one number a channel."""
    resize: Count = 0
    """Of image files: pixels of the shorter side before the crop to ``image_size``; 0 for 256/224 of that, or for just that
    with a label a pixel."""
    interpolation: Interpolation = "bilinear"
    """Of image files, when they are resized."""
    batch_size: PositiveInt = 1000
    """Images at a time in evaluation."""
    workers: Count = 0
    """Of image files: processes of torchvision's loader, threads of DALI's."""
    loader: Loader = "auto"
    """What decodes image files: ``auto`` is DALI where it is installed."""
    strict: Flag = True
    """Whether an image file that cannot be decoded is an error, or left out."""
    subset: Count = 0
    """Test on so many images, drawn once and always the same; 0 for all."""

    def __post_init__(self) -> None:
        for name, constants in (("mean", self.mean), ("std", self.std)):
            if len(constants) != self.channels:
                raise ValueError(f"{name} has {len(constants)} numbers for {self.channels} channels")
        if 0 < self.resize < self.image_size:
            raise ValueError(f"resize = {self.resize}: must be at least image_size, {self.image_size}")

    @property
    def task(self) -> Literal["classification", "segmentation"]:
        """Whether an image has one label, or a label a pixel."""
        return "segmentation" if self.name in ("shapes", "camvid", "nyuv2", "pairs") else "classification"

    @property
    def metric(self) -> str:
        """The figure that networks are judged by; in percent."""
        return "mIoU" if self.task == "segmentation" else "top-1 accuracy"

    @property
    def view(self) -> View:
        """What an image file becomes in a test."""
        resize = self.resize or round(self.image_size * 256 / 224)
        return View(resize, self.image_size, self.interpolation, self.mean, self.std)


def label_names(wanted: DataSettings) -> list[str]:
    """What the classes of a data set are called; numbers, where it does not say."""
    return list(classes_of(wanted.name, wanted.num_classes).colours)


def palette(wanted: DataSettings) -> Tensor:
    """The usual colours of a data set's classes: uint8 RGB (num_classes, 3)."""
    return torch.tensor(list(classes_of(wanted.name, wanted.num_classes).colours.values()), dtype=torch.uint8)


class Batches(Protocol):
    """Test images in batches, pass after pass: (B, C, H, W) as the teacher expects them, and labels (B,) or (B, H, W)."""

    count: int
    """Images of a pass, here: this process's share."""
    unreadable: list[str]
    """Files of the last pass that could not be decoded, and why."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


def evaluation_batches(
    wanted: DataSettings,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    rank: int = 0,
    world_size: int = 1,
    say: Callable[[str], None] = lambda remark: None,
) -> Batches:
    """The test images of a data set.

    Args:
        wanted: which, where, and how they are seen.
        device: where the network is; DALI decodes there.
        dtype: of the images where the loader can choose, float32 or float16.
        rank, world_size: this process takes every ``world_size``-th image from the ``rank``-th on: none is left out or doubled.
        say: told, in a line each, what a reader of the figures must know.

    Raises:
        DfkdError: the data is not where ``data.root`` says, or is not what its name promises.
    """
    if wanted.task == "segmentation":
        whole, unreadable = _pixels(wanted, "test", lambda count: _share(count, wanted.subset, rank, world_size), say=say)
        return PixelBatches(whole, wanted.batch_size, unreadable)
    if wanted.name not in READERS:
        split = _arrays(wanted, "test", "none")
        return ArrayBatches(split.take(_share(len(split), wanted.subset, rank, world_size)), wanted.batch_size)
    listing = read_listing(wanted.name, _root(wanted))
    if listing.classes != wanted.num_classes and (wanted.name != "list" or listing.classes > wanted.num_classes):
        raise DfkdError(f"data.num_classes is {wanted.num_classes}, but {wanted.root} has {listing.classes} classes")
    _check_channels(wanted)
    if listing.remark:
        say(listing.remark)
    shared = listing.take(_share(len(listing), wanted.subset, rank, world_size))
    return _image_batches(shared, wanted, device, dtype, say)


def _share(count: int, subset: int, rank: int, world_size: int) -> list[int]:
    """This process's images of a fixed subset, or of all."""
    if subset > count:
        raise DfkdError(f"data.subset = {subset}: there are {count} test images")
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:subset].sort().values if subset else torch.arange(count)
    return chosen[rank::world_size].tolist()


def _image_batches(listing: Listing, wanted: DataSettings, device: torch.device, dtype: torch.dtype, say: Callable[[str], None]) -> Batches:
    view, why_not = wanted.view, why_not_dali(wanted.view)
    if wanted.loader == "dali" or (wanted.loader == "auto" and why_not is None):
        if view.interpolation == "bicubic":
            say("DALI's bicubic resizing rounds otherwise than PIL's; --loader torchvision is exact")
        return DaliBatches(listing, view, wanted.batch_size, wanted.workers, device, dtype)
    if wanted.loader == "auto":
        say(f"{why_not}: images are read by torchvision")
    return FolderBatches(listing, view, wanted.batch_size, wanted.workers)


def open_split(wanted: DataSettings, split: Split, *, augment: Augment = "none") -> Dataset[Any]:
    """One split, giving images (C, H, W) normalised as the teacher expects them, and labels, () or (H, W).

    Image files are there to train on; :func:`evaluation_batches` has those to test on. With a label a pixel, images are
    squares of ``image_size`` pixels.

    Raises:
        DfkdError: the data is not where ``data.root`` says, or is not what its name promises.
    """
    if wanted.task == "segmentation":
        squares, unreadable = _pixels(wanted, split, range, crop=wanted.image_size, augment=augment)
        if unreadable and (wanted.strict or not len(squares)):
            raise DfkdError(f"{len(unreadable)} files cannot be decoded, the first {unreadable[0]}; data.strict = false leaves them out")
        return squares
    return _folder(wanted, augment) if wanted.name in READERS else _arrays(wanted, split, augment)


def _arrays(wanted: DataSettings, split: Split, augment: Augment) -> ArraySplit:
    if wanted.name == "none":
        raise DfkdError("data.name is 'none': this recipe has no images to read")
    images, labels = ARRAYS[wanted.name](wanted, split)
    _check(images, labels, wanted, split)
    return ArraySplit(images, labels, wanted.image_size, wanted.mean, wanted.std, augment=augment)


def _pixels(
    wanted: DataSettings,
    split: Split,
    choose: Callable[[int], list[int] | range],
    *,
    crop: int | None = None,
    augment: Augment = "none",
    say: Callable[[str], None] = lambda remark: None,
) -> tuple[PixelSplit, list[str]]:
    """Chosen ones of a split's images with a label a pixel, and the files that cannot be decoded."""
    classes = classes_of(wanted.name, wanted.num_classes)
    if wanted.channels != 3:
        raise DfkdError(f"data.channels is {wanted.channels}: the images of {wanted.name!r} have 3")
    if wanted.num_classes != len(classes.colours):
        raise DfkdError(f"data.num_classes is {wanted.num_classes}, but {wanted.name!r} has {len(classes.colours)} classes")
    if wanted.num_classes > 255:
        raise DfkdError(f"data.num_classes is {wanted.num_classes}: label files have room for at most 255")
    if wanted.name == "shapes":
        drawn, truth = draw_shapes(split, wanted.image_size)
        chosen = list(choose(len(drawn)))
        images, labels, unreadable = list(drawn[chosen]), list(truth[chosen]), list[str]()
    else:
        pairs = find_pairs(_root(wanted), split)
        if (whole := PUBLISHED.get(wanted.name)) not in (None, len(pairs)):
            say(f"{wanted.root} has {len(pairs):,} of the {whole} test images of {wanted.name}: what is measured is no {wanted.name} mIoU")
        shorter = wanted.resize or wanted.image_size
        images, labels, unreadable = read_pairs([pairs[i] for i in choose(len(pairs))], classes, shorter, wanted.interpolation)
    return PixelSplit(images, labels, wanted.mean, wanted.std, crop=crop, augment=augment), unreadable


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


def _folder(wanted: DataSettings, augment: Augment) -> Dataset[Any]:
    """Image files to train on."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    if wanted.name in ("list", "places365"):
        raise DfkdError(f"data.name = {wanted.name!r}: is for testing only; teachers are trained on image folders")
    _check_channels(wanted)
    root = _root(wanted)
    if not (root / "train").is_dir():
        raise DfkdError(f"data.root {root} has no folder train")
    classes = len(class_folders(root / "train"))
    if classes != wanted.num_classes:
        raise DfkdError(f"data.num_classes is {wanted.num_classes}, but {root / 'train'} has {classes} classes")
    size = wanted.image_size
    if augment == "none":
        seen = [
            transforms.Resize(wanted.view.resize, transforms.InterpolationMode(wanted.interpolation)),
            transforms.CenterCrop(size),
        ]
    else:
        flip = [transforms.RandomHorizontalFlip()] if augment == "shift_flip" else []
        seen = [transforms.RandomResizedCrop(size), *flip]
    colour = [transforms.Grayscale()] if wanted.channels == 1 else []
    end = [transforms.ToTensor(), transforms.Normalize(wanted.mean, wanted.std)]
    try:
        return ImageFolder(str(root / "train"), transforms.Compose([*seen, *colour, *end]))
    except (FileNotFoundError, RuntimeError) as error:
        raise DfkdError(f"data.root {root / 'train'} holds no image folders: {first_line(error)}") from error


def _check_channels(wanted: DataSettings) -> None:
    if wanted.channels not in (1, 3):
        raise DfkdError(f"data.channels is {wanted.channels}: images in files have 1 or 3")


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
