"""Which labelled image files a data set on disk has for testing, in the layouts users have it."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path, PurePath
from typing import Self

from dfkd_fast.errors import DfkdError, short_repr

__all__ = [
    "EXTENSIONS",
    "ImageList",
    "is_image",
    "list_file",
    "list_folder",
    "list_folder_training",
    "list_imagenet",
    "list_imagenet_training",
    "list_places365",
]

# torchvision's, and .gif, which PIL reads as well.
EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"}
OTHERS = {"__MACOSX", "@eaDir", "lost+found"}
"""Folders of macOS, Synology's and Linux's."""
IMAGENET = tuple((resources.files("dfkd_fast") / "data" / "imagenet_classes.txt").read_text().split())
"""WordNet ids, whose order is that of the classes."""
LABEL_FILES = ("val.txt", "labels.txt", "val_labels.txt", "val.csv", "labels.csv", "LOC_val_solution.csv")
"""Of images that are not in class folders; the last is Kaggle's."""
LABEL = re.compile("[0-9]{1,7}")


@dataclass(frozen=True)
class ImageList:
    """Image files and their classes, always in the same order."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: int
    note: str | None = None
    """What a reader of the figures must know, in one line."""

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: Iterable[int]) -> Self:
        """Some of the images."""
        chosen = list(indices)
        return type(self)(tuple(self.paths[i] for i in chosen), tuple(self.labels[i] for i in chosen), self.classes, self.note)


def is_image(name: str, extensions: Iterable[str] = EXTENSIONS) -> bool:
    """Whether a file is called as an image is, and as none of the files that other programs leave there (``._1.JPEG``)."""
    return not name.startswith(".") and PurePath(name).suffix.lower() in extensions


def list_imagenet(root: Path, classes: int | None) -> ImageList:
    """``val/``, or the folder itself, with folders that are called by their classes, or images with a file of labels beside them.

    A class is called by its WordNet id or by its number among the 1,000; some of them are enough.
    """
    folder = root / "val" if (root / "val").is_dir() else root
    if not _folders(folder) and _images_below(folder):
        return _labelled_elsewhere(root, folder)
    listing = _of_imagenets_folders(folder, _class_folders(folder))
    present = sorted(set(listing.labels))
    if len(present) in (0, len(IMAGENET)):
        return listing
    part = f"{len(present)} of ImageNet's 1,000 classes, {IMAGENET[present[0]]} to {IMAGENET[present[-1]]}"
    return replace(listing, note=f"{folder} has {part}, and predictions are of all 1,000")


def list_imagenet_training(root: Path) -> ImageList:
    """``train/`` with folders that are called by their classes, all 1,000."""
    folder = _training(root)
    return _complete(folder, _of_imagenets_folders(folder, _class_folders(folder)), IMAGENET)


def _of_imagenets_folders(folder: Path, folders: Sequence[Path]) -> ImageList:
    known = _imagenet_classes()
    if unknown := [path.name for path in folders if path.name not in known]:
        raise DfkdError(
            f"data.root {folder}: {len(unknown)} of {len(folders)} folders are not ImageNet classes, the first is {short_repr(unknown[0])};"
            " a class's folder is called by its WordNet id, such as n01440764, or by its number, 0 to 999"
        )
    return _of_folders(folders, [known[path.name] for path in folders], len(IMAGENET))


def _imagenet_classes() -> dict[str, int]:
    """The classes by WordNet id, and by number."""
    return {name: label for label, wnid in enumerate(IMAGENET) for name in (wnid, str(label), f"{label:03}", f"{label:04}")}


def _labelled_elsewhere(root: Path, folder: Path) -> ImageList:
    """Images of one folder, whose classes a text file beside them has: a name and a class on every line."""
    known = _imagenet_classes()
    source = next((place / name for place in (root, folder) for name in LABEL_FILES if (place / name).is_file()), None)
    if source is None:
        raise DfkdError(
            f"data.root {folder} has images and no class folders: their classes are read from {', '.join(LABEL_FILES)} beside them,"
            " a name and a WordNet id or a number, 0 to 999, on every line;"
            " the numbers of ILSVRC2012_validation_ground_truth.txt are in another order and cannot be used"
        )
    labels: dict[str, int] = {}
    for number, line in _lines(source):
        name, label = (*line.replace(",", " ").split(), "", "")[:2]
        if label in known:
            if labels.setdefault(PurePath(name).stem, known[label]) != known[label]:
                raise DfkdError(f"{source}, line {number}: {short_repr(name)} is of another class than in an earlier line")
        elif number > 1 or source.suffix != ".csv":  # the first line of a table has the names of its columns
            raise DfkdError(f"{source}, line {number}: {short_repr(line)} must be a name and a WordNet id or a number, 0 to 999")
    images = _images_below(folder)
    if alone := [path for path in images if path.stem not in labels]:
        raise DfkdError(f"{source} has no class of {len(alone)} of the {len(images)} images in {folder}, the first {alone[0].name}")
    return ImageList(tuple(images), tuple(labels[path.stem] for path in images), len(IMAGENET), f"classes are those of {source}")


def list_folder(root: Path, classes: int | None) -> ImageList:
    """``val/`` or ``test/`` with one folder a class."""
    if (folder := _tested_folder(root)) is None:
        raise DfkdError(f"data.root {root} has no folder val or test")
    folders = _class_folders(folder)
    return _of_folders(folders, range(len(folders)), len(folders))


def list_folder_training(root: Path) -> ImageList:
    """``train/`` with one folder a class, none of them empty, and the same classes as in ``val/`` or ``test/``."""
    folder = _training(root)
    folders = _class_folders(folder)
    names = [path.name for path in folders]
    # Classes are numbered in each by name: one that is missing shifts the others.
    if (tested := _tested_folder(root)) and (alone := sorted({*names} ^ {path.name for path in _class_folders(tested)})):
        raise DfkdError(f"data.root {root}: train and {tested.name} have not the same classes, {short_repr(alone[0])} is in one only")
    return _complete(folder, _of_folders(folders, range(len(folders)), len(folders)), names)


def _tested_folder(root: Path) -> Path | None:
    return next((root / name for name in ("val", "test") if (root / name).is_dir()), None)


def _training(root: Path) -> Path:
    if not (root / "train").is_dir():
        raise DfkdError(f"data.root {root} has no folder train")
    return root / "train"


def _complete(folder: Path, listing: ImageList, names: Sequence[str]) -> ImageList:
    """The listing, which has images of every class."""
    if missing := sorted(set(range(listing.classes)) - set(listing.labels)):
        raise DfkdError(
            f"data.root {folder} has no images of {len(missing)} of {listing.classes} classes, the first is {names[missing[0]]}"
        )
    return listing


def _class_folders(folder: Path) -> list[Path]:
    """The folders in a folder, by name: one a class."""
    if not (found := _folders(folder)):
        raise DfkdError(f"data.root {folder} has no folders, one a class is expected")
    return found


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, by name, but hidden ones and those of other programs."""
    try:
        return sorted(entry for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "." and entry.name not in OTHERS)
    except OSError as error:
        raise DfkdError(f"data.root {folder} cannot be read: {error}") from error


def _of_folders(folders: Sequence[Path], labels: Sequence[int], classes: int) -> ImageList:
    found = [(path, label) for folder, label in zip(folders, labels, strict=True) for path in _images_below(folder)]
    return ImageList(tuple(path for path, _ in found), tuple(label for _, label in found), classes)


def _images_below(folder: Path) -> list[Path]:
    """Image files in a folder and in those below, in the order of their paths."""

    def refuse(error: OSError) -> None:
        raise DfkdError(f"data.root {folder} cannot be read: {error}") from error

    found, seen = [], set(map(str, Path(os.path.realpath(folder)).parents))
    for place, below, files in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # by way of a link to a folder above it, whose images would count again
            below.clear()
            continue
        seen.add(real)
        below[:] = [name for name in below if not name.startswith(".")]
        found += [Path(place, name) for name in files if is_image(name)]
    return sorted(found)


def list_places365(root: Path, classes: int | None) -> ImageList:
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
    return ImageList(tuple(path for path, _ in found), tuple(label for _, label in found), classes)


def _category_folder(images: Path, name: str) -> Path:
    """Of a category such as /a/apartment_building/outdoor: so nested, or flat as apartment_building-outdoor."""
    nested, flat = images / name.strip("/"), images / "-".join(name.strip("/").split("/")[1:])
    for folder in (flat, nested):
        if folder.is_dir():
            return folder
    raise DfkdError(f"data.root {images} has no folder {flat.name} for category {name}, and no places365_val.txt lies beside it")


def list_file(path: Path, classes: int | None) -> ImageList:
    """A text file with a path and a class on every line, paths relative to it."""
    found = [(path.parent / name, label) for name, label in _pairs(path)]
    labels = [label for _, label in found]
    again = len(found) - len({image for image, _ in found})
    note = f"{path} has {again} lines of files that it had before: these images count more than once" if again else None
    return ImageList(tuple(image for image, _ in found), tuple(labels), max(labels, default=0) + 1, note)


def _pairs(path: Path) -> Iterator[tuple[str, int]]:
    """The lines of a text file: a path, blanks, a class."""
    for number, line in _lines(path):
        parts = line.rsplit(maxsplit=1)
        if len(parts) < 2 or not LABEL.fullmatch(parts[1]) or "\0" in line:
            raise DfkdError(f"{path}, line {number}: {short_repr(line)} must be a path, a space and a class's number, from 0 on")
        yield parts[0], int(parts[1])


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not blank, and their numbers, from 1 on."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # with a mark in front, as Windows' editors put there
    except (OSError, UnicodeDecodeError) as error:
        raise DfkdError(f"{path} cannot be read: {error}") from error
    # Not splitlines, which parts names at characters that only look like ends of lines.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.strip()


def _check_labels(path: Path, labels: list[int], classes: int) -> None:
    if labels and max(labels) >= classes:
        raise DfkdError(f"{path}: classes run from {min(labels)} to {max(labels)}, allowed are 0 to {classes - 1}")
