"""Segmentation data sets: read from pairs of files, or synthetic."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from dfkd_fast.errors import DfkdError

from .classes import Classes, numbered_classes
from .pairs import find_pairs, read_pairs
from .settings import DataSet, DataSettings, LoadContext, Task, resolve_root
from .splits import Augment, SegmentationBatches, SegmentationDataset, Split

__all__ = ["SegmentationSet"]

MAX_CLASSES = 255  # 8-bit label files, with one ID for unlabeled pixels


@dataclass(frozen=True, kw_only=True)
class SegmentationSet(DataSet):
    """A data set with per-pixel labels."""

    labels: Classes | None = None
    """Names, colours and IDs of the classes; None for numbered classes."""
    draw: Callable[[Split, int], tuple[Tensor, Tensor]] | None = None
    """Function from a split and an image size in pixels to synthetic images and labels; None if they are read from files."""

    task: ClassVar[Task] = "segmentation"

    @override
    def class_set(self, settings: DataSettings) -> Classes:
        return self.labels or numbered_classes(settings.num_classes)

    @override
    def test_batches(self, settings: DataSettings, context: LoadContext) -> SegmentationBatches:
        images, unreadable = self._read(settings, "test", context.choose, log=context.log)
        return SegmentationBatches(images, settings.batch_size, unreadable)

    @override
    def open_split(self, settings: DataSettings, split: Split, augment: Augment) -> SegmentationDataset:
        crops, unreadable = self._read(settings, split, range, crop=settings.image_size, augment=augment)
        if unreadable and (settings.strict or not len(crops)):
            raise DfkdError(f"{len(unreadable)} files cannot be decoded, the first {unreadable[0]}; data.strict = false leaves them out")
        return crops

    def _read(
        self,
        settings: DataSettings,
        split: Split,
        choose: Callable[[int], Sequence[int]],
        *,
        crop: int | None = None,
        augment: Augment = "none",
        log: Callable[[str], None] = lambda note: None,
    ) -> tuple[SegmentationDataset, list[str]]:
        """Returns the images of a split that ``choose`` selects by number, and the files that cannot be decoded."""
        classes = self.class_set(settings)
        if settings.channels != 3:
            raise DfkdError(f"data.channels is {settings.channels}: must be 3 for {settings.name!r}")
        if settings.num_classes != len(classes.colours):
            raise DfkdError(f"data.num_classes is {settings.num_classes}, but {settings.name!r} has {len(classes.colours)} classes")
        if settings.num_classes > MAX_CLASSES:
            raise DfkdError(f"data.num_classes is {settings.num_classes}: must be at most {MAX_CLASSES}, since label files are 8-bit")
        if self.draw is not None:
            all_images, all_labels = self.draw(split, settings.image_size)
            indices = list(choose(len(all_images)))
            images, labels, unreadable = list(all_images[indices]), list(all_labels[indices]), list[str]()
        else:
            pairs = find_pairs(resolve_root(settings), split)
            if self.test_images not in (None, len(pairs)):
                part = f"{len(pairs):,} of the {self.test_images} test images of {settings.name}"
                log(f"{settings.root} has {part}: the result is not comparable to published {settings.name} mIoU")
            shorter = settings.resize or settings.image_size
            images, labels, unreadable = read_pairs([pairs[i] for i in choose(len(pairs))], classes, shorter, settings.interpolation)
        return SegmentationDataset(images, labels, settings.mean, settings.std, crop=crop, augment=augment), unreadable
