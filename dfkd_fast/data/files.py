"""Data sets of labeled image files: image lists for evaluation, class folders for teacher training."""

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
from .settings import DATA_SETS, Batches, DataSet, DataSettings, LoadContext, check_channels, resolve_root
from .splits import MAX_SHIFT, Augment, Split, has_flips, padding_mode

__all__ = ["FileSet", "list_test_images"]


@dataclass(frozen=True, kw_only=True)
class FileSet(DataSet):
    """A data set of labeled image files."""

    list_files: Callable[[Path, int | None], ImageList]
    """Function from the data set's path and its number of classes (None if unknown) to the test images."""
    list_training: Callable[[Path], ImageList] | None = None
    """Function from the data set's path to the training images, which include every class; None if the data set has none."""
    has_every_class: bool = True
    """Whether the test images include the last class, so that they determine the number of classes."""

    image_files = True

    @override
    def test_batches(self, settings: DataSettings, context: LoadContext) -> Batches:
        image_list = self.list_test_images(settings.name, resolve_root(settings))
        if image_list.classes > settings.num_classes or (self.has_every_class and image_list.classes != settings.num_classes):
            raise DfkdError(f"data.num_classes is {settings.num_classes}, but {settings.root} has {image_list.classes} classes")
        check_channels(settings)
        if image_list.note:
            context.log(image_list.note)
        image_list = image_list.take(context.choose(len(image_list)))
        transform, dali_unavailable = settings.eval_transform, dali_unavailable_reason(settings.eval_transform)
        if settings.loader == "dali" or (settings.loader == "auto" and dali_unavailable is None):
            if transform.interpolation == "bicubic":
                context.log("DALI's bicubic interpolation rounds differently from PIL's; data.loader = 'torchvision' is exact")
            return DaliBatches(image_list, transform, settings.batch_size, settings.workers, context.device, context.dtype)
        if settings.loader == "auto":
            context.log(f"{dali_unavailable}: images are read by torchvision")
        return FolderBatches(image_list, transform, settings.batch_size, settings.workers)

    @override
    def open_split(self, settings: DataSettings, split: Split, augment: Augment) -> Dataset[Any]:
        if self.list_training is None:
            raise DfkdError(f"data.name = {settings.name!r}: has no training images; use data.name = 'folder' to train a teacher")
        check_channels(settings)
        image_list = self.list_training(resolve_root(settings))
        if image_list.classes != settings.num_classes:
            raise DfkdError(f"data.num_classes is {settings.num_classes}, but {settings.root}/train has {image_list.classes} classes")
        return TrainingImages(image_list, _training_transform(settings, augment), strict=settings.strict)

    def list_test_images(self, name: str, root: Path) -> ImageList:
        """See :func:`list_test_images`."""
        image_list = self.list_files(root, self.classes)
        if not image_list.paths:
            raise DfkdError(f"data.root {root} contains no images")
        if self.test_images is None or len(image_list) == self.test_images:
            return image_list
        part = f"{len(image_list):,} of the {self.test_images:,} validation images of {name}"
        note = f"{root} has {part}: the result is not comparable to published {name} accuracy"
        return replace(image_list, note=f"{image_list.note}; {note}" if image_list.note else note)


def list_test_images(name: str, root: Path) -> ImageList:
    """Returns the test images of a data set with their labels.

    Args:
        name: name of a data set of image files, such as ``imagenet`` or ``folder``.
        root: path of the data set.

    Raises:
        DfkdError: the files do not exist or are not in the expected layout.
    """
    data_set = DATA_SETS[name]
    assert isinstance(data_set, FileSet), name
    return data_set.list_test_images(name, root)


def _training_transform(settings: DataSettings, augment: Augment) -> Callable[[Image.Image], Tensor]:
    """Returns the transform from a PIL image to a normalized tensor (C, image_size, image_size), with augmentation."""
    from torchvision import transforms

    size = settings.image_size
    whole = [
        transforms.Resize(settings.eval_transform.resize, transforms.InterpolationMode(settings.interpolation)),
        transforms.CenterCrop(size),
    ]
    flip = [transforms.RandomHorizontalFlip()] if has_flips(augment) else []
    if augment == "none":
        crop = whole
    elif settings.is_stored_at_size:
        crop = [*whole, transforms.RandomCrop(size, padding=MAX_SHIFT, padding_mode=padding_mode(augment)), *flip]  # as splits.shift
    else:
        crop = [transforms.RandomResizedCrop(size), *flip]
    grayscale = [transforms.Grayscale()] if settings.channels == 1 else []
    transform: Callable[[Image.Image], Tensor] = transforms.Compose(
        [*crop, *grayscale, transforms.ToTensor(), transforms.Normalize(settings.mean, settings.std)]
    )
    return transform
