"""Lists the labeled image files of data sets in their common layouts on disk."""

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

# torchvision's extensions, and .gif, which PIL can read too.
EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"}
IGNORED_FOLDERS = {"__MACOSX", "@eaDir", "lost+found"}
"""Folders that macOS, Synology NAS and Linux file systems create."""
IMAGENET = tuple((resources.files("dfkd_fast") / "data" / "imagenet_classes.txt").read_text().split())
"""WordNet IDs of ImageNet's classes, in the order of the labels."""
LABEL_FILES = ("val.txt", "labels.txt", "val_labels.txt", "val.csv", "labels.csv", "LOC_val_solution.csv")
"""Names of label files for images that are not in class folders; the last is Kaggle's."""
LABEL = re.compile("[0-9]{1,7}")


@dataclass(frozen=True)
class ImageList:
    """Image files with their labels, in a deterministic order."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: int
    """Number of classes."""
    note: str | None = None
    """A one-line caveat for the interpretation of the metrics, or None."""

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: Iterable[int]) -> Self:
        """Returns the subset of the images with the given indices, in that order."""
        indices = list(indices)
        return type(self)(tuple(self.paths[i] for i in indices), tuple(self.labels[i] for i in indices), self.classes, self.note)


def is_image(name: str, extensions: Iterable[str] = EXTENSIONS) -> bool:
    """Returns True if a file name has one of the extensions and is not hidden, such as macOS's ``._1.JPEG``."""
    return not name.startswith(".") and PurePath(name).suffix.lower() in extensions


def list_imagenet(root: Path, classes: int | None) -> ImageList:
    """Lists ImageNet's validation images in ``root/val`` or ``root``.

    The images are in class folders, or in one folder with a label file beside them. Classes are identified by WordNet ID or by
    number, 0 to 999. A subset of the classes is allowed.
    """
    folder = root / "val" if (root / "val").is_dir() else root
    if not _subfolders(folder) and _find_images(folder):
        return _list_with_label_file(root, folder)
    image_list = _list_imagenet_folders(folder, _class_folders(folder))
    present = sorted(set(image_list.labels))
    if len(present) in (0, len(IMAGENET)):
        return image_list
    part = f"{len(present)} of ImageNet's 1,000 classes, {IMAGENET[present[0]]} to {IMAGENET[present[-1]]}"
    return replace(image_list, note=f"{folder} has {part}; predictions are over all 1,000")


def list_imagenet_training(root: Path) -> ImageList:
    """Lists ImageNet's training images in ``root/train``, which must have class folders for all 1,000 classes."""
    folder = _training_folder(root)
    return _check_complete(folder, _list_imagenet_folders(folder, _class_folders(folder)), IMAGENET)


def _list_imagenet_folders(folder: Path, folders: Sequence[Path]) -> ImageList:
    labels = _imagenet_labels()
    if unknown := [path.name for path in folders if path.name not in labels]:
        raise DfkdError(
            f"data.root {folder}: {len(unknown)} of {len(folders)} folders are not ImageNet classes, the first is {short_repr(unknown[0])};"
            " class folders must be named by WordNet ID, such as n01440764, or by number, 0 to 999"
        )
    return _list_class_folders(folders, [labels[path.name] for path in folders], len(IMAGENET))


def _imagenet_labels() -> dict[str, int]:
    """Returns ImageNet's labels by WordNet ID and by number, with or without leading zeros."""
    return {name: label for label, wnid in enumerate(IMAGENET) for name in (wnid, str(label), f"{label:03}", f"{label:04}")}


def _list_with_label_file(root: Path, folder: Path) -> ImageList:
    """Lists the images of one folder with the labels of a text file, which has an image name and a class on every line."""
    classes = _imagenet_labels()
    source = next((parent / name for parent in (root, folder) for name in LABEL_FILES if (parent / name).is_file()), None)
    if source is None:
        raise DfkdError(
            f"data.root {folder} has images but no class folders: their labels must be in one of {', '.join(LABEL_FILES)} beside them,"
            " with an image name and a WordNet ID or number, 0 to 999, on every line;"
            " the numbers in ILSVRC2012_validation_ground_truth.txt have a different order and cannot be used"
        )
    labels: dict[str, int] = {}
    for number, line in _lines(source):
        name, label = (*line.replace(",", " ").split(), "", "")[:2]
        if label in classes:
            if labels.setdefault(PurePath(name).stem, classes[label]) != classes[label]:
                raise DfkdError(f"{source}, line {number}: {short_repr(name)} has a different class on an earlier line")
        elif number > 1 or source.suffix != ".csv":  # the first line of a CSV file may be a header
            raise DfkdError(f"{source}, line {number}: {short_repr(line)} must be an image name and a WordNet ID or number, 0 to 999")
    images = _find_images(folder)
    if unlabeled := [path for path in images if path.stem not in labels]:
        raise DfkdError(
            f"{source} has no label for {len(unlabeled)} of the {len(images)} images in {folder}, the first is {unlabeled[0].name}"
        )
    return ImageList(tuple(images), tuple(labels[path.stem] for path in images), len(IMAGENET), f"labels are read from {source}")


def list_folder(root: Path, classes: int | None) -> ImageList:
    """Lists the images in ``root/val`` or ``root/test``, which has one folder per class; labels follow the sorted folder names."""
    if (folder := _test_folder(root)) is None:
        raise DfkdError(f"data.root {root} has no folder val or test")
    folders = _class_folders(folder)
    return _list_class_folders(folders, range(len(folders)), len(folders))


def list_folder_training(root: Path) -> ImageList:
    """Lists the images in ``root/train``, which must have the same class folders as ``val`` or ``test``, with images in each."""
    folder = _training_folder(root)
    folders = _class_folders(folder)
    names = [path.name for path in folders]
    # Labels follow the sorted folder names, so a missing folder would shift the labels of the following classes.
    if (test := _test_folder(root)) and (unmatched := sorted({*names} ^ {path.name for path in _class_folders(test)})):
        raise DfkdError(f"data.root {root}: train and {test.name} must have the same classes, {short_repr(unmatched[0])} is in only one")
    return _check_complete(folder, _list_class_folders(folders, range(len(folders)), len(folders)), names)


def _test_folder(root: Path) -> Path | None:
    return next((root / name for name in ("val", "test") if (root / name).is_dir()), None)


def _training_folder(root: Path) -> Path:
    if not (root / "train").is_dir():
        raise DfkdError(f"data.root {root} has no folder train")
    return root / "train"


def _check_complete(folder: Path, image_list: ImageList, names: Sequence[str]) -> ImageList:
    """Returns the image list; raises a :class:`DfkdError` if a class has no images."""
    if missing := sorted(set(range(image_list.classes)) - set(image_list.labels)):
        raise DfkdError(
            f"data.root {folder} has no images of {len(missing)} of {image_list.classes} classes, the first is {names[missing[0]]}"
        )
    return image_list


def _class_folders(folder: Path) -> list[Path]:
    """Returns the class folders in a folder, sorted by name."""
    if not (folders := _subfolders(folder)):
        raise DfkdError(f"data.root {folder} has no folders, one per class is expected")
    return folders


def _subfolders(folder: Path) -> list[Path]:
    """Returns the folders in a folder, sorted by name, without hidden folders and those of operating systems."""
    try:
        return sorted(entry for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "." and entry.name not in IGNORED_FOLDERS)
    except OSError as error:
        raise DfkdError(f"data.root {folder} cannot be read: {error}") from error


def _list_class_folders(folders: Sequence[Path], labels: Sequence[int], classes: int) -> ImageList:
    samples = [(path, label) for folder, label in zip(folders, labels, strict=True) for path in _find_images(folder)]
    return ImageList(tuple(path for path, _ in samples), tuple(label for _, label in samples), classes)


def _find_images(folder: Path) -> list[Path]:
    """Returns the image files in a folder and its subfolders, sorted by path; hidden folders are skipped, symbolic links followed."""

    def refuse(error: OSError) -> None:
        raise DfkdError(f"data.root {folder} cannot be read: {error}") from error

    images, visited = [], set(map(str, Path(os.path.realpath(folder)).parents))
    for parent, subfolders, files in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(parent)) in visited:  # a link to a parent folder, whose images would be listed twice
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        images += [Path(parent, name) for name in files if is_image(name)]
    return sorted(images)


def list_places365(root: Path, classes: int | None) -> ImageList:
    """Lists the validation images of Places365.

    ``root`` must have ``categories_places365.txt``, and either ``places365_val.txt`` with the images in ``val_256``, ``val_large``
    or ``val``, or one of these folders with one folder per category.
    """
    categories = dict(_read_labels(root / "categories_places365.txt"))
    assert classes is not None
    if len(categories) != classes or set(categories.values()) != set(range(classes)):
        raise DfkdError(f"{root / 'categories_places365.txt'} has {len(categories)} categories, must have {classes}, numbered from 0")
    images = next((root / name for name in ("val_256", "val_large", "val") if (root / name).is_dir()), None)
    if images is None:
        raise DfkdError(f"data.root {root} has no folder val_256, val_large or val")
    if (root / "places365_val.txt").is_file():
        samples = [(images / path, label) for path, label in _read_labels(root / "places365_val.txt")]
        _check_labels(root / "places365_val.txt", [label for _, label in samples], classes)
    else:
        samples = [(path, label) for name, label in categories.items() for path in _find_images(_category_folder(images, name))]
    return ImageList(tuple(path for path, _ in samples), tuple(label for _, label in samples), classes)


def _category_folder(images: Path, name: str) -> Path:
    """Returns the folder of a category such as /a/apartment_building/outdoor: apartment_building-outdoor, or nested like the name."""
    nested, flat = images / name.strip("/"), images / "-".join(name.strip("/").split("/")[1:])
    for folder in (flat, nested):
        if folder.is_dir():
            return folder
    raise DfkdError(f"data.root {images} has no folder {flat.name} for category {name}, and there is no places365_val.txt")


def list_file(path: Path, classes: int | None) -> ImageList:
    """Lists the images of a text file with an image path, relative to the file, and a class number on every line."""
    samples = [(path.parent / name, label) for name, label in _read_labels(path)]
    labels = [label for _, label in samples]
    duplicates = len(samples) - len({image for image, _ in samples})
    note = f"{path} has {duplicates} duplicate lines: these images count more than once" if duplicates else None
    return ImageList(tuple(image for image, _ in samples), tuple(labels), max(labels, default=0) + 1, note)


def _read_labels(path: Path) -> Iterator[tuple[str, int]]:
    """Yields the path and the class number on every line of a text file, separated by white space."""
    for number, line in _lines(path):
        parts = line.rsplit(maxsplit=1)
        if len(parts) < 2 or not LABEL.fullmatch(parts[1]) or "\0" in line:
            raise DfkdError(f"{path}, line {number}: {short_repr(line)} must be a path, a space and a class number ≥ 0")
        yield parts[0], int(parts[1])


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the line number, starting at 1, and the stripped text of every line that is not blank."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows' editors write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise DfkdError(f"{path} cannot be read: {error}") from error
    # Not splitlines, which also splits at characters such as U+2028 that may occur in file names.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.strip()


def _check_labels(path: Path, labels: list[int], classes: int) -> None:
    if labels and max(labels) >= classes:
        raise DfkdError(f"{path}: class numbers are {min(labels)} to {max(labels)}, must be 0 to {classes - 1}")
