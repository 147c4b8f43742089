"""Data sets that are image files with a label each: a listing to test on, folders of classes to train on."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from dfkd_fast.errors import DfkdError

from .dali import DaliBatches, dali_unavailable_reason
from .folder import FolderBatches, TrainingImages
from .image_lists import ImageList
from .settings import DATA_SETS, Access, Batches, DataSet, DataSettings, check_channels, root_of
from .splits import Augment, Split

__all__ = ["FileSet", "list_test_images"]


@dataclass(frozen=True, kw_only=True)
class FileSet(DataSet):
    """A data set of image files."""

    list_files: Callable[[Path, int | None], ImageList]
    """From where it lies, and its number of classes where that is known, the files to test on."""
    list_training: Callable[[Path], ImageList] | None = None
    """The files to train on, some of every class; None where there are none."""
    has_every_class: bool = True
    """Whether some file is of the last class, so that the number of classes can be told from the files."""

    image_files = True

    @override
    def test_batches(self, settings: DataSettings, access: Access) -> Batches:
        listing = self.listing(settings.name, root_of(settings))
        if listing.classes > settings.num_classes or (self.has_every_class and listing.classes != settings.num_classes):
            raise DfkdError(f"data.num_classes is {settings.num_classes}, but {settings.root} has {listing.classes} classes")
        check_channels(settings)
        if listing.note:
            access.log(listing.note)
        listing = listing.take(access.choose(len(listing)))
        view, why_not = settings.view, dali_unavailable_reason(settings.view)
        if settings.loader == "dali" or (settings.loader == "auto" and why_not is None):
            if view.interpolation == "bicubic":
                access.log("DALI's bicubic resizing rounds otherwise than PIL's; data.loader = 'torchvision' is exact")
            return DaliBatches(listing, view, settings.batch_size, settings.workers, access.device, access.dtype)
        if settings.loader == "auto":
            access.log(f"{why_not}: images are read by torchvision")
        return FolderBatches(listing, view, settings.batch_size, settings.workers)

    @override
    def open_split(self, settings: DataSettings, split: Split, augment: Augment) -> Dataset[Any]:
        if self.list_training is None:
            raise DfkdError(f"data.name = {settings.name!r}: is for testing only; teachers are trained on image folders")
        check_channels(settings)
        listing = self.list_training(root_of(settings))
        if listing.classes != settings.num_classes:
            raise DfkdError(f"data.num_classes is {settings.num_classes}, but {settings.root}/train has {listing.classes} classes")
        return TrainingImages(listing, _changes(settings, augment), strict=settings.strict)

    def listing(self, name: str, root: Path) -> ImageList:
        """The files to test on; see :func:`list_test_images`."""
        listing = self.list_files(root, self.classes)
        if not listing.paths:
            raise DfkdError(f"data.root {root}: no images in it")
        if self.test_images is None or len(listing) == self.test_images:
            return listing
        part = f"{len(listing):,} of the {self.test_images:,} validation images of {name}"
        note = f"{root} has {part}: what is measured is no {name} accuracy"
        return replace(listing, note=f"{listing.note}; {note}" if listing.note else note)


def list_test_images(name: str, root: Path) -> ImageList:
    """The image files that a data set is tested on.

    Args:
        name: of a data set of image files; its lister says how they lie on disk.
        root: where it lies.

    Raises:
        DfkdError: it is not there, or not laid out so.
    """
    row = DATA_SETS[name]
    assert isinstance(row, FileSet), name
    return row.listing(name, root)


def _changes(settings: DataSettings, augment: Augment) -> Callable[[Image.Image], Tensor]:
    """What becomes of a picture in training."""
    from torchvision import transforms

    size = settings.image_size
    if augment == "none":
        seen = [
            transforms.Resize(settings.view.resize, transforms.InterpolationMode(settings.interpolation)),
            transforms.CenterCrop(size),
        ]
    else:
        flip = [transforms.RandomHorizontalFlip()] if augment == "shift_flip" else []
        seen = [transforms.RandomResizedCrop(size), *flip]
    colour = [transforms.Grayscale()] if settings.channels == 1 else []
    changed: Callable[[Image.Image], Tensor] = transforms.Compose(
        [*seen, *colour, transforms.ToTensor(), transforms.Normalize(settings.mean, settings.std)]
    )
    return changed
