"""What a recipe says of its images, and what every data set answers to."""

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

__all__ = ["DATA_SETS", "Access", "Batches", "DataSet", "DataSettings", "check_channels", "root_of"]

Task = Literal["classification", "segmentation"]
LONGEST_SIDE = 2**14
"""Of an image, in pixels."""


class Batches(Protocol):
    """Test images in batches, pass after pass: (B, C, H, W) as the teacher expects them, and labels (B,) or (B, H, W)."""

    count: int
    """Images of a pass, here: this process's share."""
    unreadable: list[str]
    """Files of the last pass that could not be decoded, and why."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True)
class Access:
    """How the images of a test are served to this process."""

    choose: Callable[[int], Sequence[int]]
    """Of so many images, those of this process."""
    device: torch.device
    """Where the network is; DALI decodes there."""
    dtype: torch.dtype
    """Of the images where the loader can choose, float32 or float16."""
    log: Callable[[str], None]
    """Told, in a line each, what a reader of the figures must know."""


@dataclass(frozen=True, kw_only=True)
class DataSet(abc.ABC):
    """A row of the table: what is known of a data set, and how it is opened."""

    classes: int | None = None
    """How many there are of image files; None where the files say."""
    test_images: int | None = None
    """Of the whole published set."""
    needs_root: bool = True
    """Whether it lies on disk."""
    is_file: bool = False
    """Whether it is a file there, and no folder."""

    task: ClassVar[Task] = "classification"
    has_images: ClassVar[bool] = True
    image_files: ClassVar[bool] = False
    """Whether its images are files with a label each, which any network can be tested on."""

    def classes_of(self, settings: "DataSettings") -> Classes:
        """The classes by name, with their colours."""
        return numbered_classes(settings.num_classes)

    @abc.abstractmethod
    def test_batches(self, settings: "DataSettings", access: Access) -> Batches:
        """See :func:`dfkd_fast.data.evaluation_batches`."""

    @abc.abstractmethod
    def open_split(self, settings: "DataSettings", split: Split, augment: Augment) -> Dataset[Any]:
        """See :func:`dfkd_fast.data.open_split`."""


DATA_SETS: dict[str, DataSet] = {}
"""What ``data.name`` can name; filled by :mod:`dfkd_fast.data.table`."""


def _known(name: str) -> str:
    if name not in DATA_SETS:
        raise PydanticCustomError("choice", "not a data set", {"allowed": list(DATA_SETS)})
    return name


@settings
class DataSettings:
    """Recipe section ``[data]``: what images the teacher takes, and where labelled ones are for testing."""

    name: Annotated[str, AfterValidator(_known)] = "digits"
    """A row of the table (:mod:`dfkd_fast.data.table`), or ``none``: no data at all, nothing is evaluated."""
    root: str = ""
    """Folder (or file) that holds it; nothing is downloaded."""
    num_classes: Annotated[int, Field(strict=True, ge=2, le=1_000_000)] = 10
    channels: PositiveInt = 1
    image_size: Annotated[int, Field(strict=True, ge=8, le=LONGEST_SIDE)] = 32
    """Side of the teacher's input in pixels; with a label a pixel, of what it is trained on: tests show whole images."""
    mean: tuple[Number, ...] = (0.5,)
    std: tuple[Positive, ...] = (0.5,)
    """Normalisation of images in [0, 1], one number a channel."""
    resize: Annotated[int, Field(strict=True, ge=0, le=LONGEST_SIDE)] = 0
    """Of image files: pixels of the shorter side before the crop to ``image_size``; 0 for 256/224 of that, or for just that
    with a label a pixel."""
    interpolation: Interpolation = "bilinear"
    """Of image files, when they are resized."""
    batch_size: PositiveInt = 1000
    """Images at a time in evaluation."""
    workers: Annotated[int, Field(strict=True, ge=0, le=1024)] = 0
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
    def data_set(self) -> DataSet:
        """Its row of the table."""
        return DATA_SETS[self.name]

    @property
    def task(self) -> Task:
        """Whether an image has one label, or every pixel has."""
        return self.data_set.task

    @property
    def metric(self) -> str:
        """The figure that networks are judged by; in percent."""
        return "mIoU" if self.task == "segmentation" else "top-1 accuracy"

    @property
    def has_images(self) -> bool:
        """Whether there are labelled images at all."""
        return self.data_set.has_images

    @property
    def can_be_opened(self) -> bool:
        """Whether ``root`` says where they are, or need not."""
        return self.has_images and (self.root != "" or not self.data_set.needs_root)

    @property
    def view(self) -> EvalTransform:
        """What an image file becomes in a test."""
        resize = self.resize or round(self.image_size * 256 / 224)
        return EvalTransform(resize, self.image_size, self.interpolation, self.mean, self.std)


def root_of(settings: DataSettings) -> Path:
    """Where the data lies; nothing for a data set that does not lie on disk.

    Raises:
        DfkdError: ``data.root`` is empty, does not exist, or is a folder for a file.
    """
    if not settings.data_set.needs_root:
        return Path()
    if not settings.root:
        raise DfkdError(f"data.root = '': data set {settings.name!r} needs the folder that holds it; nothing is downloaded")
    root = expanded(settings.root)
    if not root.exists():
        raise DfkdError(f"data.root {root} does not exist")
    if root.is_dir() == settings.data_set.is_file:
        found, expected = ("folder", "file") if root.is_dir() else ("file", "folder")
        raise DfkdError(f"data.root {root} is a {found}: data set {settings.name!r} is a {expected}")
    return root


def check_channels(settings: DataSettings) -> None:
    """Raise a :class:`DfkdError` unless image files can have so many channels."""
    if settings.channels not in (1, 3):
        raise DfkdError(f"data.channels is {settings.channels}: images in files have 1 or 3")
