"""Data sets with per-pixel labels: pairs of files, or drawn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from dfkd_fast.errors import DfkdError

from .classes import Classes, numbered_classes
from .pairs import find_pairs, read_pairs
from .settings import Access, DataSet, DataSettings, Task, root_of
from .splits import Augment, SegmentationBatches, SegmentationDataset, Split

__all__ = ["SegmentationSet"]

MOST_CLASSES = 255  # that label files have room for


@dataclass(frozen=True, kw_only=True)
class SegmentationSet(DataSet):
    """A data set with a label for every pixel."""

    labels: Classes | None = None
    """What its classes are called, how they are painted, and their numbers in label files; None for numbered ones."""
    draw: Callable[[Split, int], tuple[Tensor, Tensor]] | None = None
    """From a split and a side in pixels, images and labels; None where they are read from pairs of files."""

    task: ClassVar[Task] = "segmentation"

    @override
    def classes_of(self, settings: DataSettings) -> Classes:
        return self.labels or numbered_classes(settings.num_classes)

    @override
    def test_batches(self, settings: DataSettings, access: Access) -> SegmentationBatches:
        whole, unreadable = self._read(settings, "test", access.choose, log=access.log)
        return SegmentationBatches(whole, settings.batch_size, unreadable)

    @override
    def open_split(self, settings: DataSettings, split: Split, augment: Augment) -> SegmentationDataset:
        squares, unreadable = self._read(settings, split, range, crop=settings.image_size, augment=augment)
        if unreadable and (settings.strict or not len(squares)):
            raise DfkdError(f"{len(unreadable)} files cannot be decoded, the first {unreadable[0]}; data.strict = false leaves them out")
        return squares

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
        """Chosen ones of a split's images, and the files that cannot be decoded."""
        classes = self.classes_of(settings)
        if settings.channels != 3:
            raise DfkdError(f"data.channels is {settings.channels}: the images of {settings.name!r} have 3")
        if settings.num_classes != len(classes.colours):
            raise DfkdError(f"data.num_classes is {settings.num_classes}, but {settings.name!r} has {len(classes.colours)} classes")
        if settings.num_classes > MOST_CLASSES:
            raise DfkdError(f"data.num_classes is {settings.num_classes}: label files have room for at most {MOST_CLASSES}")
        if self.draw is not None:
            drawn, truth = self.draw(split, settings.image_size)
            chosen = list(choose(len(drawn)))
            images, labels, unreadable = list(drawn[chosen]), list(truth[chosen]), list[str]()
        else:
            pairs = find_pairs(root_of(settings), split)
            if self.test_images not in (None, len(pairs)):
                part = f"{len(pairs):,} of the {self.test_images} test images of {settings.name}"
                log(f"{settings.root} has {part}: what is measured is no {settings.name} mIoU")
            shorter = settings.resize or settings.image_size
            images, labels, unreadable = read_pairs([pairs[i] for i in choose(len(pairs))], classes, shorter, settings.interpolation)
        return SegmentationDataset(images, labels, settings.mean, settings.std, crop=crop, augment=augment), unreadable
