"""Loads labeled image files with PIL, torchvision and a DataLoader: the reference for all other loaders."""

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

__all__ = ["FolderBatches", "ImageDecodeError", "TrainingImages", "open_image"]


class ImageDecodeError(Exception):
    """PIL cannot decode an image file; the message has its path and the reason."""


def open_image(path: Path, mode: str | None = "RGB") -> Image.Image:
    """Returns the first frame of an image file, without applying the EXIF orientation.

    Args:
        path: a file of any format that PIL supports.
        mode: PIL mode to convert to; None keeps the file's mode.

    Raises:
        ImageDecodeError: the file cannot be decoded.
    """
    try:
        with path.open("rb") as file:
            image = Image.open(file)
            return image.convert(mode) if mode else image.copy()
    except Exception as error:  # PIL's plugins raise exceptions of any type for broken files
        reason = "is empty" if path.is_file() and not path.stat().st_size else first_line(error)
        name = str(path).encode(errors="backslashreplace").decode()  # names that are not UTF-8 cannot be printed
        raise ImageDecodeError(f"{name} ({reason})") from error


class _Images(Dataset[Any]):
    def __init__(self, image_list: ImageList, transform: EvalTransform) -> None:
        from torchvision import transforms

        # Strings, because copying them to worker processes is much faster than copying Path objects.
        self.paths = [str(path) for path in image_list.paths]
        self.labels = image_list.labels
        grayscale = [transforms.Grayscale()] if len(transform.mean) == 1 else []
        self.transform = transforms.Compose(
            [
                transforms.Resize(transform.resize, transforms.InterpolationMode(transform.interpolation)),
                transforms.CenterCrop(transform.crop),
                *grayscale,
                transforms.ToTensor(),
                transforms.Normalize(transform.mean, transform.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | str:
        try:
            return self.transform(open_image(Path(self.paths[index]))), self.labels[index]
        except ImageDecodeError as error:
            return str(error)


class FolderBatches:
    """Batches of an image list: channels-last float32 images (B, C, crop, crop) and labels (B,); the last batch may be smaller.

    Args:
        image_list: the files and labels.
        transform: the preprocessing.
        batch_size: number of images per batch.
        workers: number of worker processes; 0 decodes in this process.
    """

    def __init__(self, image_list: ImageList, transform: EvalTransform, batch_size: int, workers: int) -> None:
        self.count = len(image_list)
        self.unreadable: list[str] = []
        """Files that could not be decoded in the last pass, each with the reason."""
        self.loader = DataLoader(
            _Images(image_list, transform),
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
    """Returns images, labels and the messages of the samples that could not be decoded."""
    decoded = [sample for sample in samples if not isinstance(sample, str)]
    images = torch.stack([image for image, _ in decoded]) if decoded else torch.empty(0)
    labels = torch.tensor([label for _, label in decoded], dtype=torch.long)
    channels_last = images.contiguous(memory_format=torch.channels_last) if decoded else images
    return channels_last, labels, [sample for sample in samples if isinstance(sample, str)]


class TrainingImages(Dataset[tuple[Tensor, int]]):
    """Training images of an image list with random augmentation.

    Args:
        image_list: the files and labels.
        transform: from a PIL image to a tensor (C, H, W), applied at every access.
        strict: whether a file that cannot be decoded raises an error or is left out of its batch.
    """

    def __init__(self, image_list: ImageList, transform: Callable[[Image.Image], Tensor], *, strict: bool) -> None:
        self.paths = [str(path) for path in image_list.paths]
        self.labels = image_list.labels
        self.transform = transform
        self.strict = strict

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Returns an image and its label; raises a :class:`DfkdError` if the file cannot be decoded."""
        try:
            return self.transform(open_image(Path(self.paths[index]))), self.labels[index]
        except ImageDecodeError as error:
            raise DfkdError(f"image {error} cannot be decoded; data.strict = false leaves it out") from error

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]] | DfkdError:
        """Returns the samples that can be decoded, or the error if ``strict``; a raised error would be wrapped by a worker process."""
        samples = []
        for index in indices:
            try:
                samples.append(self[index])
            except DfkdError as error:
                if self.strict:
                    return error
        return samples
