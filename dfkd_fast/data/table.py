"""The data sets that a recipe can name, one row each, in the layouts users have them on disk. Nothing is downloaded."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from dfkd_fast.errors import DfkdError

from .arrays import ArraySet, digits, npz, torchvision_arrays
from .classes import CAMVID, NYUV2, SHAPES
from .files import FileSet
from .image_lists import list_file, list_folder, list_folder_training, list_imagenet, list_imagenet_training, list_places365
from .pixels import SegmentationSet
from .settings import DATA_SETS, Access, Batches, DataSet, DataSettings
from .shapes import draw_shapes
from .splits import Augment, Split

__all__ = ["class_names", "evaluation_batches", "open_split", "palette"]


class NoData(DataSet):
    """A recipe without images: nothing is evaluated, and no teacher is trained."""

    has_images = False

    @override
    def test_batches(self, settings: DataSettings, access: Access) -> NoReturn:
        _refuse()

    @override
    def open_split(self, settings: DataSettings, split: Split, augment: Augment) -> NoReturn:
        _refuse()


def _refuse() -> NoReturn:
    raise DfkdError("data.name is 'none': this recipe has no images to read")


DATA_SETS.update(
    {
        # Images and labels in arrays.
        "digits": ArraySet(read=digits, needs_root=False),  # scikit-learn's
        "mnist": ArraySet(read=torchvision_arrays("MNIST")),
        "fashion-mnist": ArraySet(read=torchvision_arrays("FashionMNIST")),
        "cifar10": ArraySet(read=torchvision_arrays("CIFAR10")),
        "cifar100": ArraySet(read=torchvision_arrays("CIFAR100")),
        "npz": ArraySet(read=npz, is_file=True),
        # Image files.
        "imagenet": FileSet(list_files=list_imagenet, list_training=list_imagenet_training, classes=1000, test_images=50_000),
        "places365": FileSet(list_files=list_places365, classes=365, test_images=36_500),
        "folder": FileSet(list_files=list_folder, list_training=list_folder_training),
        "list": FileSet(list_files=list_file, has_every_class=False, is_file=True),
        # A label for every pixel.
        "shapes": SegmentationSet(labels=SHAPES, draw=draw_shapes, needs_root=False),  # a toy
        "camvid": SegmentationSet(labels=CAMVID, test_images=233),
        "nyuv2": SegmentationSet(labels=NYUV2, test_images=654),
        "pairs": SegmentationSet(),
        "none": NoData(needs_root=False),
    }
)


def class_names(settings: DataSettings) -> list[str]:
    """What the classes of a data set are called; numbers, where it does not say."""
    return list(settings.data_set.classes_of(settings).colours)


def palette(settings: DataSettings) -> Tensor:
    """The usual colours of a data set's classes: uint8 RGB (num_classes, 3)."""
    return torch.tensor(list(settings.data_set.classes_of(settings).colours.values()), dtype=torch.uint8)


def evaluation_batches(
    settings: DataSettings,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    rank: int = 0,
    world_size: int = 1,
    log: Callable[[str], None] = lambda note: None,
) -> Batches:
    """The test images of a data set.

    Args:
        settings: which, where, and how they are seen.
        device: where the network is; DALI decodes there.
        dtype: of the images where the loader can choose, float32 or float16.
        rank, world_size: this process takes every ``world_size``-th image from the ``rank``-th on: none is left out or doubled.
        log: told, in a line each, what a reader of the figures must know.

    Raises:
        DfkdError: the data is not where ``data.root`` says, or is not what its name promises.
    """

    def choose(count: int) -> list[int]:
        """This process's images of a fixed subset, or of all."""
        if settings.subset > count:
            raise DfkdError(f"data.subset = {settings.subset}: there are {count} test images")
        order = torch.arange(count)
        if settings.subset:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: settings.subset].sort().values
        return order[rank::world_size].tolist()

    return settings.data_set.test_batches(settings, Access(choose, device, dtype, log))


def open_split(settings: DataSettings, split: Split, *, augment: Augment = "none") -> Dataset[Any]:
    """One split, giving images (C, H, W) normalised as the teacher expects them, and labels, () or (H, W).

    Image files are there to train on; :func:`evaluation_batches` has those to test on. With per-pixel labels, images are
    squares of ``image_size`` pixels.

    Raises:
        DfkdError: the data is not where ``data.root`` says, or is not what its name promises.
    """
    return settings.data_set.open_split(settings, split, augment)
