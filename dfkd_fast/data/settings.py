"""The recipe section ``[data]``, and the interface of all data sets."""

import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError
from torch import Tensor
from torch.utils.data import Dataset

from dfkd_fast.choices import Loader
from dfkd_fast.errors import DfkdError
from dfkd_fast.files import expanded
from dfkd_fast.settings import Count, Flag, Number, Positive, PositiveInt, settings

from .classes import Classes, numbered_classes
from .eval_transform import EvalTransform, Interpolation
from .splits import Augment, Split

__all__ = ["DATA_SETS", "Batches", "DataSet", "DataSettings", "LoadContext", "check_channels", "resolve_root"]

Task = Literal["classification", "segmentation"]
MAX_IMAGE_SIZE = 2**14
"""Largest height and width of images, in pixels."""
MAX_STORED_SIZE = 64
"""Largest ``image_size`` at which data sets are stored at the size of the network's input, as CIFAR and TinyImageNet are."""


class Batches(Protocol):
    """Iterable of test batches: images (B, C, H, W) in the teacher's input space, and labels (B,) or (B, H, W).

    It can be iterated any number of times.
    """

    count: int
    """Number of images of this process."""
    unreadable: list[str]
    """Files that could not be decoded in the last pass, each with the reason."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True)
class LoadContext:
    """Options of :meth:`DataSet.test_batches` that depend on the process."""

    choose: Callable[[int], Sequence[int]]
    """Function from the number of images to the indices of this process's images."""
    device: torch.device
    """Device of the network; DALI decodes on it."""
    dtype: torch.dtype
    """Dtype of the images, float32 or float16, if the loader supports it."""
    log: Callable[[str], None]
    """Called with one line for each caveat about the metrics."""


@dataclass(frozen=True, kw_only=True)
class DataSet(abc.ABC):
    """Base class of the data sets: properties of a data set, and methods that load it."""

    classes: int | None = None
    """Number of classes; None if the files determine it."""
    test_images: int | None = None
    """Number of test images of the published data set; None if there is no such number."""
    needs_root: bool = True
    """Whether the data set is read from ``data.root``."""
    is_file: bool = False
    """Whether ``data.root`` is a file instead of a folder."""

    task: ClassVar[Task] = "classification"
    has_images: ClassVar[bool] = True
    image_files: ClassVar[bool] = False
    """Whether the images are files with one label each, on which any classifier can be evaluated."""
    can_hold_out: ClassVar[bool] = False
    """Whether training images can be held out for evaluation, see ``data.holdout``."""

    def class_set(self, settings: "DataSettings") -> Classes:
        """Returns the names and colours of the classes."""
        return numbered_classes(settings.num_classes)

    @abc.abstractmethod
    def test_batches(self, settings: "DataSettings", context: LoadContext) -> Batches:
        """See :func:`dfkd_fast.data.evaluation_batches`."""

    @abc.abstractmethod
    def open_split(self, settings: "DataSettings", split: Split, augment: Augment) -> Dataset[Any]:
        """See :func:`dfkd_fast.data.open_split`."""


DATA_SETS: dict[str, DataSet] = {}
"""Data sets by ``data.name``; registered in :mod:`dfkd_fast.data.table`."""


def _check_name(name: str) -> str:
    if name not in DATA_SETS:
        raise PydanticCustomError("choice", "not a data set", {"allowed": list(DATA_SETS)})
    return name


@settings
class DataSettings:
    """Recipe section ``[data]``: the teacher's input, and the labeled data for evaluation."""

    name: Annotated[str, AfterValidator(_check_name)] = "digits"
    """Name of the data set (:mod:`dfkd_fast.data.table`); ``none`` for no data and no evaluation."""
    root: str = ""
    """Folder or file of the data set; nothing is downloaded."""
    num_classes: Annotated[int, Field(strict=True, ge=2, le=1_000_000)] = 10
    channels: PositiveInt = 1
    image_size: Annotated[int, Field(strict=True, ge=8, le=MAX_IMAGE_SIZE)] = 32
    """Height and width of the teacher's input, in pixels; for segmentation, of the training crops, while evaluation uses whole
    images."""
    mean: tuple[Number, ...] = (0.5,)
    std: tuple[Positive, ...] = (0.5,)
    """Per-channel mean and standard deviation of images in [0, 1], for normalization."""
    resize: Annotated[int, Field(strict=True, ge=0, le=MAX_IMAGE_SIZE)] = 0
    """Shorter side of image files after resizing and before the center crop, in pixels; 0 for ``image_size`` · 256/224, or
    for ``image_size`` itself in segmentation and up to 64 pixels, the size at which such images are stored."""
    interpolation: Interpolation = "bilinear"
    """Interpolation when image files are resized."""
    batch_size: PositiveInt = 1000
    """Batch size in evaluation."""
    workers: Annotated[int, Field(strict=True, ge=0, le=1024)] = 0
    """Worker processes of torchvision's loader for image files, or threads of DALI's."""
    loader: Loader = "auto"
    """Loader of image files; ``auto`` is DALI if it is installed, otherwise torchvision."""
    strict: Flag = True
    """Whether an image file that cannot be decoded is an error or is left out."""
    subset: Count = 0
    """Evaluate on a fixed random subset of this many images; 0 for all."""
    holdout: Count = 0
    """Number of training images that no teacher is trained on, and on which everything is evaluated instead of the test images; 0 for
    evaluation on the test images. They are the first indices of ``torch.randperm`` with seed 0, so that a smaller holdout is a subset
    of a larger one."""

    def __post_init__(self) -> None:
        for name, constants in (("mean", self.mean), ("std", self.std)):
            if len(constants) != self.channels:
                raise ValueError(f"{name} has {len(constants)} numbers for {self.channels} channels")
        if 0 < self.resize < self.image_size:
            raise ValueError(f"resize = {self.resize}: must be at least image_size, {self.image_size}")
        if self.holdout and not self.data_set.can_hold_out:
            supported = ", ".join(name for name, data_set in DATA_SETS.items() if data_set.can_hold_out)
            raise ValueError(f"holdout = {self.holdout}: must be 0 for data set {self.name!r}; only {supported} support it")

    @property
    def data_set(self) -> DataSet:
        """The data set called ``name``."""
        return DATA_SETS[self.name]

    @property
    def task(self) -> Task:
        """``classification`` if every image has one label, ``segmentation`` if every pixel has one."""
        return self.data_set.task

    @property
    def metric(self) -> str:
        """Name of the task's main metric, which is in percent; it names the images if they are not test images."""
        name = "mIoU" if self.task == "segmentation" else "top-1 accuracy"
        return f"{name} ({self.evaluated_on})" if self.holdout else name

    @property
    def evaluated_on(self) -> str:
        """Name of the images of the evaluation: "test images", or for example "5,000 held-out training images"."""
        if not self.holdout:
            return "test images"
        part = f"{self.subset:,} of " if self.subset else ""
        return f"{part}{self.holdout:,} held-out training images"

    @property
    def has_images(self) -> bool:
        """Whether the data set has labeled images; False for ``none``."""
        return self.data_set.has_images

    @property
    def can_be_opened(self) -> bool:
        """Whether the data set has images, and ``root`` is set if the data set needs it."""
        return self.has_images and (self.root != "" or not self.data_set.needs_root)

    @property
    def is_stored_at_size(self) -> bool:
        """Whether image files are expected to have the size of the network's input, so that none of their margin is cropped."""
        return self.image_size <= MAX_STORED_SIZE

    @property
    def eval_transform(self) -> EvalTransform:
        """Preprocessing of image files in evaluation."""
        resize = self.resize or (self.image_size if self.is_stored_at_size else round(self.image_size * 256 / 224))
        return EvalTransform(resize, self.image_size, self.interpolation, self.mean, self.std)


def resolve_root(settings: DataSettings) -> Path:
    """Returns the expanded path of ``data.root``; an empty path for data sets that need none.

    Raises:
        DfkdError: ``data.root`` is empty, does not exist, or is a folder instead of a file or the reverse.
    """
    if not settings.data_set.needs_root:
        return Path()
    if not settings.root:
        raise DfkdError(f"data.root = '': data set {settings.name!r} needs the folder that holds it; nothing is downloaded")
    root = expanded(settings.root)
    if not root.exists():
        raise DfkdError(f"data.root {root} does not exist")
    if root.is_dir() == settings.data_set.is_file:
        actual, expected = ("folder", "file") if root.is_dir() else ("file", "folder")
        raise DfkdError(f"data.root {root} is a {actual}: data set {settings.name!r} must be a {expected}")
    return root


def check_channels(settings: DataSettings) -> None:
    """Raises a :class:`DfkdError` unless ``data.channels`` is 1 or 3, as image files require."""
    if settings.channels not in (1, 3):
        raise DfkdError(f"data.channels is {settings.channels}: must be 1 or 3 for image files")
