"""Finds and reads pairs of image and label files for segmentation, in their common layouts on disk."""

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
from .folder import ImageDecodeError, open_image
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
"""Folders of images and of labels."""
MAX_NAMES = 4
"""Number of files that an error message lists."""


def find_pairs(root: Path, split: Split) -> list[Pair]:
    """Returns the image and label files of a split, sorted by image.

    Files are paired by stem, or by the last number in the stem if no image and label have the same stem.

    Raises:
        DfkdError: the folders do not exist, there are no images, or a file is not part of exactly one pair.
    """
    layouts = [(image.format(name), label.format(name)) for name in NAMES[split] for image, label in LAYOUTS]
    folders = next(([root / image, root / label] for image, label in layouts if (root / image).is_dir() and (root / label).is_dir()), None)
    if folders is None:
        names = ", ".join(f"{image} + {label}" for image, label in layouts[: len(LAYOUTS)])
        raise DfkdError(f"data.root {root} has no folders of images and labels for the {split} split; supported layouts: {names}")
    images, labels = _files(folders[0], EXTENSIONS), _files(folders[1], {".png"})
    if not images:
        raise DfkdError(f"data.root {folders[0]} contains no images")
    stems_agree = {path.stem for path in images} & {path.stem for path in labels}
    groups: dict[str, list[Path]] = defaultdict(list)
    for path in images + labels:
        groups[path.stem if stems_agree else _last_number(path.stem)].append(path)
    pairs = [(group[0], group[-1]) for group in groups.values() if [path.parent for path in group] == folders]
    if unpaired := sorted({*images, *labels} - {path for pair in pairs for path in pair}):
        names = ", ".join(str(path.relative_to(root)) for path in unpaired[:MAX_NAMES])
        more = f" and {len(unpaired) - MAX_NAMES} more" if len(unpaired) > MAX_NAMES else ""
        raise DfkdError(f"data.root {root}: every image must have one label file of the same name or number; unpaired: {names}{more}")
    return pairs


def _files(folder: Path, extensions: set[str]) -> list[Path]:
    return sorted(path for path in folder.iterdir() if is_image(path.name, extensions))


def _last_number(stem: str) -> str:
    """Returns the last number in a file name without leading zeros: 12 for new_nyu_class13_0012."""
    return (re.findall(r"\d+", stem) or [stem])[-1].lstrip("0")


def read_pairs(
    pairs: Sequence[Pair], classes: Classes, shorter: int, interpolation: Interpolation
) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Decodes and resizes pairs of image and label files.

    Args:
        pairs: image and label files.
        classes: the meaning of the IDs in label files.
        shorter: shorter side after resizing, in pixels.
        interpolation: interpolation of the images; labels are resized with nearest-neighbor interpolation.

    Returns:
        Images, uint8 (3, H, W); labels, int16 (H, W); and the files that cannot be decoded, each with the reason. Pairs with such a
        file are left out.

    Raises:
        DfkdError: a label file has more than one channel, unknown IDs, or a different size than its image.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import pil_to_tensor, resize

    lookup = classes.lookup_table()

    def read(pair: Pair) -> tuple[Tensor, Tensor] | str:
        try:
            image, label = open_image(pair[0]), open_image(pair[1], mode=None)
        except ImageDecodeError as error:
            return str(error)
        if label.mode not in ("L", "P"):
            raise DfkdError(f"{pair[1]} must have class IDs in one 8-bit channel (PIL mode L or P), not mode {label.mode}")
        if label.size != image.size:
            raise DfkdError(f"{pair[1]} has {label.width} × {label.height} pixels, its image {image.width} × {image.height}")
        present = np.flatnonzero(label.histogram())
        if len(unknown := present[lookup[present] == UNKNOWN]):
            last_id, ignored = classes.first_id + len(classes.colours) - 1, " or ".join(map(str, classes.ignored_ids))
            raise DfkdError(f"{pair[1]} has class ID {unknown[0]}: must be {classes.first_id} to {last_id}, or {ignored} for unlabeled")
        ids = np.asarray(resize(label, shorter, InterpolationMode.NEAREST))
        return pil_to_tensor(resize(image, shorter, InterpolationMode(interpolation))), torch.from_numpy(lookup[ids])

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(read, pairs))
    decoded = [pair for pair in results if not isinstance(pair, str)]
    return (
        [image for image, _ in decoded],
        [label for _, label in decoded],
        [reason for reason in results if isinstance(reason, str)],
    )
