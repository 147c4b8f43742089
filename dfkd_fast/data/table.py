"""Registry of the data sets that a recipe can name, read from disk in their common layouts. Nothing is downloaded."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from dfkd_fast.errors import DfkdError

from .arrays import ArraySet, digits, npz, torchvision_arrays
from .cifar import cifar
from .classes import CAMVID, NYUV2, SHAPES
from .files import FileSet
from .image_lists import list_file, list_folder, list_folder_training, list_imagenet, list_imagenet_training, list_places365
from .pixels import SegmentationSet
from .settings import DATA_SETS, Batches, DataSet, DataSettings, LoadContext
from .shapes import draw_shapes
from .splits import Augment, Split

__all__ = ["class_names", "evaluation_batches", "open_split", "palette"]


class NoData(DataSet):
    """The data set ``none``: no evaluation and no teacher training."""

    has_images = False

    @override
    def test_batches(self, settings: DataSettings, context: LoadContext) -> NoReturn:
        _refuse()

    @override
    def open_split(self, settings: DataSettings, split: Split, augment: Augment) -> NoReturn:
        _refuse()


def _refuse() -> NoReturn:
    raise DfkdError("data.name is 'none': this recipe has no images to read")


DATA_SETS.update(
    {
        # Arrays.
        "digits": ArraySet(read=digits, needs_root=False),  # scikit-learn's
        "mnist": ArraySet(read=torchvision_arrays("MNIST")),
        "fashion-mnist": ArraySet(read=torchvision_arrays("FashionMNIST")),
        "cifar10": ArraySet(read=cifar("CIFAR10")),
        "cifar100": ArraySet(read=cifar("CIFAR100")),
        "cifar100-coarse": ArraySet(read=cifar("CIFAR100", coarse=True), classes=20),
        "npz": ArraySet(read=npz, is_file=True),
        # Image files.
        "imagenet": FileSet(list_files=list_imagenet, list_training=list_imagenet_training, classes=1000, test_images=50_000),
        "places365": FileSet(list_files=list_places365, classes=365, test_images=36_500),
        "folder": FileSet(list_files=list_folder, list_training=list_folder_training),
        "list": FileSet(list_files=list_file, has_every_class=False, is_file=True),
        # Per-pixel labels.
        "shapes": SegmentationSet(labels=SHAPES, draw=draw_shapes, needs_root=False),  # synthetic
        "camvid": SegmentationSet(labels=CAMVID, test_images=233),
        "nyuv2": SegmentationSet(labels=NYUV2, test_images=654),
        "pairs": SegmentationSet(),
        "none": NoData(needs_root=False),
    }
)


def class_names(settings: DataSettings) -> list[str]:
    """Returns the class names of a data set; numbers if it does not define names."""
    return list(settings.data_set.class_set(settings).colours)


def palette(settings: DataSettings) -> Tensor:
    """Returns the colours of a data set's classes for label maps, uint8 RGB (num_classes, 3)."""
    return torch.tensor(list(settings.data_set.class_set(settings).colours.values()), dtype=torch.uint8)


def evaluation_batches(
    settings: DataSettings,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    rank: int = 0,
    world_size: int = 1,
    log: Callable[[str], None] = lambda note: None,
) -> Batches:
    """Returns the test batches of a data set, or batches of its held-out training images.

    Args:
        settings: recipe section ``[data]``.
        device: device of the network; DALI decodes on it.
        dtype: dtype of the images, float32 or float16, if the loader supports it.
        rank, world_size: this process gets every ``world_size``-th image, starting at ``rank``; the shares of all processes are
            disjoint and complete.
        log: called with one line for each caveat about the metrics.

    Raises:
        DfkdError: the data at ``data.root`` does not exist or does not match the settings.
    """

    def choose(count: int) -> list[int]:
        """Returns the indices of this process's images out of ``count``, or out of a fixed random subset."""
        if settings.subset > count:
            images = "held-out training images" if settings.holdout else "test images"
            raise DfkdError(f"data.subset = {settings.subset}: must be at most {count}, the number of {images}")
        order = torch.arange(count)
        if settings.subset:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: settings.subset].sort().values
        return order[rank::world_size].tolist()

    return settings.data_set.test_batches(settings, LoadContext(choose, device, dtype, log))


def open_split(settings: DataSettings, split: Split, *, augment: Augment = "none") -> Dataset[Any]:
    """Returns one split of a data set, with images (C, H, W) in the teacher's normalized input space and labels () or (H, W).

    For image files, this is the training split whatever ``split`` is; :func:`evaluation_batches` reads the test images. For
    segmentation, images and labels are crops of ``image_size`` pixels.

    Args:
        settings: recipe section ``[data]``.
        split: ``train`` or ``test``; with ``data.holdout``, these are the training images that are not held out, and those that are.
        augment: random augmentation of the images.

    Raises:
        DfkdError: the data at ``data.root`` does not exist or does not match the settings.
    """
    return settings.data_set.open_split(settings, split, augment)
