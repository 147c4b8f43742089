"""Labelled image files through torchvision and a DataLoader: what every other way of reading them must agree with."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dfkd_fast.errors import DfkdError, first_line

from .eval_transform import EvalTransform
from .image_lists import ImageList

__all__ = ["FolderBatches", "TrainingImages", "Unreadable", "open_image"]


class Unreadable(Exception):  # noqa: N818  # it is found, not raised at anyone
    """A file that PIL cannot decode; the message names it and says why."""


def open_image(path: Path, mode: str | None = "RGB") -> Image.Image:
    """Decode a file of any format, mode and number of frames as PIL does: its first frame, unrotated, in its own mode if in none.

    Raises:
        Unreadable: it cannot be decoded.
    """
    try:
        with path.open("rb") as file:
            image = Image.open(file)
            return image.convert(mode) if mode else image.copy()
    except Exception as error:  # PIL's plugins let through whatever a broken file makes of them
        reason = "is empty" if path.is_file() and not path.stat().st_size else first_line(error)
        name = str(path).encode(errors="backslashreplace").decode()  # which may be no UTF-8, and then cannot be printed
        raise Unreadable(f"{name} ({reason})") from error


class _Images(Dataset[Any]):
    def __init__(self, listing: ImageList, view: EvalTransform) -> None:
        from torchvision import transforms

        # Strings, which a worker process copies far faster than paths.
        self.paths = [str(path) for path in listing.paths]
        self.labels = listing.labels
        grey = [transforms.Grayscale()] if len(view.mean) == 1 else []
        self.view = transforms.Compose(
            [
                transforms.Resize(view.resize, transforms.InterpolationMode(view.interpolation)),
                transforms.CenterCrop(view.crop),
                *grey,
                transforms.ToTensor(),
                transforms.Normalize(view.mean, view.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | str:
        try:
            return self.view(open_image(Path(self.paths[index]))), self.labels[index]
        except Unreadable as error:
            return str(error)


class FolderBatches:
    """Batches of a listing: images (B, C, crop, crop) float32, channels-last, and labels (B,); the last may be smaller.

    Args:
        listing: the files.
        view: what becomes of them.
        batch_size: files a batch.
        workers: processes that decode; 0 for this one.
    """

    def __init__(self, listing: ImageList, view: EvalTransform, batch_size: int, workers: int) -> None:
        self.count = len(listing)
        self.unreadable: list[str] = []
        """Files of the last pass that could not be decoded, and why."""
        self.loader = DataLoader(
            _Images(listing, view),
            batch_size,
            num_workers=min(workers, -(-self.count // batch_size)),
            collate_fn=_collate,
            generator=torch.Generator(),
            pin_memory=torch.cuda.is_available(),
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.unreadable.clear()
        for images, labels, unreadable in self.loader:
            self.unreadable += unreadable
            if len(labels):
                yield images, labels


def _collate(samples: Sequence[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor, list[str]]:
    read = [sample for sample in samples if not isinstance(sample, str)]
    images = torch.stack([image for image, _ in read]) if read else torch.empty(0)
    labels = torch.tensor([label for _, label in read], dtype=torch.long)
    channels_last = images.contiguous(memory_format=torch.channels_last) if read else images
    return channels_last, labels, [sample for sample in samples if isinstance(sample, str)]


class TrainingImages(Dataset[tuple[Tensor, int]]):
    """The files of a listing to train on, changed anew each time they are served.

    Args:
        listing: the files.
        changed: what becomes of a picture.
        strict: whether a file that cannot be decoded is an error, or left out of its batch.
    """

    def __init__(self, listing: ImageList, changed: Callable[[Image.Image], Tensor], *, strict: bool) -> None:
        self.paths = [str(path) for path in listing.paths]
        self.labels = listing.labels
        self.changed = changed
        self.strict = strict

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Raise a :class:`DfkdError` where the file cannot be decoded."""
        try:
            return self.changed(open_image(Path(self.paths[index]))), self.labels[index]
        except Unreadable as error:
            raise DfkdError(f"image {error} cannot be decoded; data.strict = false leaves it out") from error

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]] | DfkdError:
        """What can be decoded of a batch, or the error, which a worker process hands over as it is."""
        served = []
        for index in indices:
            try:
                served.append(self[index])
            except DfkdError as error:
                if self.strict:
                    return error
        return served
