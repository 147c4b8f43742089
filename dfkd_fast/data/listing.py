"""Which labelled image files a data set on disk has for testing, in the layouts users have it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from dfkd_fast.errors import DfkdError

__all__ = ["Listing", "class_folders", "list_file", "list_folder", "list_imagenet", "list_places365"]

# torchvision's, and .gif, which PIL reads as well.
EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"}


@dataclass(frozen=True)
class Listing:
    """Image files and their classes, always in the same order."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: int
    remark: str | None = None
    """What a reader of the figures must know, in one line."""

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: Iterable[int]) -> Self:
        """Some of the images."""
        chosen = list(indices)
        return type(self)(tuple(self.paths[i] for i in chosen), tuple(self.labels[i] for i in chosen), self.classes, self.remark)


def class_folders(folder: Path) -> list[Path]:
    """The folders in a folder, by name: one a class.

    Raises:
        DfkdError: there is none.
    """
    found = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise DfkdError(f"data.root {folder} has no folders, one a class is expected")
    return found


def list_imagenet(root: Path, classes: int | None) -> Listing:
    """``val/``, or the folder itself, with one folder a WordNet id, whose order is that of the classes."""
    folder = root / "val" if (root / "val").is_dir() else root
    folders = class_folders(folder)
    if len(folders) != classes:
        raise DfkdError(f"data.root {folder} has {len(folders)} class folders, ImageNet has {classes}")
    return _of_folders(folders)


def list_folder(root: Path, classes: int | None) -> Listing:
    """``val/`` or ``test/`` with one folder a class."""
    folder = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if folder is None:
        raise DfkdError(f"data.root {root} has no folder val or test")
    return _of_folders(class_folders(folder))


def _of_folders(folders: list[Path]) -> Listing:
    found = [(path, label) for label, folder in enumerate(folders) for path in _images_below(folder)]
    return Listing(tuple(path for path, _ in found), tuple(label for _, label in found), len(folders))


def _images_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)


def list_places365(root: Path, classes: int | None) -> Listing:
    """``places365_val.txt`` and ``categories_places365.txt`` beside ``val_256/``, ``val_large/`` or ``val/``; or ``val/`` with a folder
    a category."""
    categories = dict(_pairs(root / "categories_places365.txt"))
    assert classes is not None
    if len(categories) != classes or set(categories.values()) != set(range(classes)):
        raise DfkdError(f"{root / 'categories_places365.txt'} has {len(categories)} categories, Places365 has {classes}, numbered from 0")
    images = next((root / name for name in ("val_256", "val_large", "val") if (root / name).is_dir()), None)
    if images is None:
        raise DfkdError(f"data.root {root} has no folder val_256, val_large or val")
    if (root / "places365_val.txt").is_file():
        found = [(images / path, label) for path, label in _pairs(root / "places365_val.txt")]
        _check_labels(root / "places365_val.txt", [label for _, label in found], classes)
    else:
        found = [(path, label) for name, label in categories.items() for path in _images_below(_category_folder(images, name))]
    return Listing(tuple(path for path, _ in found), tuple(label for _, label in found), classes)


def _category_folder(images: Path, name: str) -> Path:
    """Of a category such as /a/apartment_building/outdoor: so nested, or flat as apartment_building-outdoor."""
    nested, flat = images / name.strip("/"), images / "-".join(name.strip("/").split("/")[1:])
    for folder in (flat, nested):
        if folder.is_dir():
            return folder
    raise DfkdError(f"data.root {images} has no folder {flat.name} for category {name}, and no places365_val.txt lies beside it")


def list_file(path: Path, classes: int | None) -> Listing:
    """A text file with a path and a class on every line, paths relative to it."""
    found = [(path.parent / name, label) for name, label in _pairs(path)]
    labels = [label for _, label in found]
    _check_labels(path, labels, max(labels, default=0) + 1)
    return Listing(tuple(image for image, _ in found), tuple(labels), max(labels, default=0) + 1)


def _pairs(path: Path) -> Iterator[tuple[str, int]]:
    """The lines of a text file: a name, a space, a class."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DfkdError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.lstrip("-").isdecimal():
            raise DfkdError(f"{path}, line {number}: {line!r} must be a name and a class's number")
        yield name.strip(), int(label)


def _check_labels(path: Path, labels: list[int], classes: int) -> None:
    if labels and not 0 <= min(labels) <= max(labels) < classes:
        raise DfkdError(f"{path}: classes run from {min(labels)} to {max(labels)}, allowed are 0 to {classes - 1}")
