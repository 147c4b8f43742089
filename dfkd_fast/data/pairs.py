"""Images and label files in pairs: where users have them on disk, and what they hold."""

import re
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dfkd_fast.errors import DfkdError

from .classes import UNKNOWN, Classes
from .eval_transform import Interpolation
from .folder import Unreadable, open_image
from .image_lists import EXTENSIONS, is_image
from .splits import Split

__all__ = ["find_pairs", "read_pairs"]

Pair = tuple[Path, Path]
NAMES: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "val")}
LAYOUTS = (
    ("{}/images", "{}/labels"),
    ("images/{}", "labels/{}"),
    ("{}", "{}annot"),  # SegNet's CamVid
    ("{}", "{}_annot"),
    ("image/{}", "seg13/{}"),
    ("{}_rgb", "{}_seg13"),
    ("nyu_{}_rgb", "nyuv2_{}_class13"),  # NYUv2's archives, unpacked
    ("nyu_{}_rgb", "{}_labels_13"),
)
"""Folders of images, and of labels."""
NAMED = 4
"""Files that an error names, of many."""


def find_pairs(root: Path, split: Split) -> list[Pair]:
    """Image and label files that have the same stem, or the same last number where no stems agree; in the images' order.

    Raises:
        DfkdError: there are no such folders, no images, or files without one partner.
    """
    tried = [(image.format(name), label.format(name)) for name in NAMES[split] for image, label in LAYOUTS]
    found = next(([root / image, root / label] for image, label in tried if (root / image).is_dir() and (root / label).is_dir()), None)
    if found is None:
        named = ", ".join(f"{image} + {label}" for image, label in tried[: len(LAYOUTS)])
        raise DfkdError(f"data.root {root} has no folders of images and of labels to {split} on; known are {named}")
    images, labels = _files(found[0], EXTENSIONS), _files(found[1], {".png"})
    if not images:
        raise DfkdError(f"data.root {found[0]}: no images in it")
    stems_agree = {path.stem for path in images} & {path.stem for path in labels}
    groups: dict[str, list[Path]] = defaultdict(list)
    for path in images + labels:
        groups[path.stem if stems_agree else _last_number(path.stem)].append(path)
    pairs = [(group[0], group[-1]) for group in groups.values() if [path.parent for path in group] == found]
    if alone := sorted({*images, *labels} - {path for pair in pairs for path in pair}):
        named = ", ".join(str(path.relative_to(root)) for path in alone[:NAMED])
        more = f" and {len(alone) - NAMED} more" if len(alone) > NAMED else ""
        raise DfkdError(f"data.root {root}: every image must have one label of its name or number, not so {named}{more}")
    return pairs


def _files(folder: Path, extensions: set[str]) -> list[Path]:
    return sorted(path for path in folder.iterdir() if is_image(path.name, extensions))


def _last_number(stem: str) -> str:
    """Of new_nyu_class13_0012: 12."""
    return (re.findall(r"\d+", stem) or [stem])[-1].lstrip("0")


def read_pairs(
    pairs: Sequence[Pair], classes: Classes, shorter: int, interpolation: Interpolation
) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Decode and resize pairs of files.

    Args:
        pairs: image and label files.
        classes: what the numbers in label files mean.
        shorter: pixels of the shorter side.
        interpolation: of the images; labels are those of the nearest pixels.

    Returns:
        Images, uint8 (3, H, W), labels, int16 (H, W), and the files that cannot be decoded with the reason: their pairs are
        left out.

    Raises:
        DfkdError: a label file has colours or unknown numbers, or another size than its image.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import pil_to_tensor, resize

    table = classes.table()

    def read(pair: Pair) -> tuple[Tensor, Tensor] | str:
        try:
            image, label = open_image(pair[0]), open_image(pair[1], mode=None)
        except Unreadable as error:
            return str(error)
        if label.mode not in ("L", "P"):
            raise DfkdError(f"{pair[1]} must hold class numbers in one channel of 8 bits (PIL's mode L or P), not {label.mode}")
        if label.size != image.size:
            raise DfkdError(f"{pair[1]} has {label.width} × {label.height} pixels, its image {image.width} × {image.height}")
        present = np.flatnonzero(label.histogram())
        if len(unknown := present[table[present] == UNKNOWN]):
            allowed = f"{classes.first} to {classes.first + len(classes.colours) - 1}, and {' or '.join(map(str, classes.void))} for none"
            raise DfkdError(f"{pair[1]} has the class number {unknown[0]}: allowed are {allowed}")
        numbers = np.asarray(resize(label, shorter, InterpolationMode.NEAREST))
        return pil_to_tensor(resize(image, shorter, InterpolationMode(interpolation))), torch.from_numpy(table[numbers])

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(read, pairs))
    read_ones = [pair for pair in found if not isinstance(pair, str)]
    return (
        [image for image, _ in read_ones],
        [label for _, label in read_ones],
        [reason for reason in found if isinstance(reason, str)],
    )
