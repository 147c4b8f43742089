"""CIFAR-10 and CIFAR-100 as torchvision reads them, and what is wrong with files that it refuses."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dfkd_fast.console import shell_quoted
from dfkd_fast.errors import DfkdError, first_line

from .splits import Split

__all__ = ["SUPERCLASSES", "cifar"]

SUPERCLASSES = {
    "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}
"""CIFAR-100's 20 coarse classes with their fine classes; coarse labels, and all fine labels, follow the alphabetical order."""
COARSE = np.array([label for _, label in sorted((fine, label) for label, names in enumerate(SUPERCLASSES.values()) for fine in names)])
"""Coarse label of each fine label of CIFAR-100."""


def cifar(name: str, *, coarse: bool = False) -> Callable[[Path, Split], tuple[np.ndarray, np.ndarray]]:
    """Returns a reader of torchvision's data set class ``name``, "CIFAR10" or "CIFAR100", from its unpacked Python version.

    torchvision compares the MD5 of every file with the published one before it unpickles any, so no other pickle is loaded.

    Args:
        name: of the class in ``torchvision.datasets``.
        coarse: return CIFAR-100's coarse labels, 0 to 19, instead of the fine ones.
    """

    def read(root: Path, split: Split) -> tuple[np.ndarray, np.ndarray]:
        from torchvision import datasets

        layout: Any = getattr(datasets, name)
        if not (root / layout.base_folder).exists() and _is_batches(root, layout):
            layout = type(name, (layout,), {"base_folder": ""})
        try:
            data = layout(str(root), train=split == "train", download=False)
        except (RuntimeError, OSError) as error:
            problem = _problem(root, layout) or first_line(error)
            raise DfkdError(f"data.root {root} does not hold {name} in torchvision's layout: {problem}") from error
        labels = np.asarray(data.targets)
        return np.asarray(data.data), COARSE[labels] if coarse else labels

    return read


def _is_batches(folder: Path, layout: Any) -> bool:
    """Returns True if a folder holds one of the files with images itself."""
    return any((folder / file).is_file() for file, _ in (*layout.train_list, *layout.test_list))


def _problem(root: Path, layout: Any) -> str:
    """Returns the first reason for which torchvision refuses a folder; empty if there is none."""
    folder, archive = root / layout.base_folder, root / layout.filename
    if not folder.is_dir():
        if archive.is_file():
            return f"{archive.name} is not unpacked; do so with tar -xzf {shell_quoted(archive)} -C {shell_quoted(root)}"
        return f"it has no folder {layout.base_folder}"
    for file, expected in (*layout.train_list, *layout.test_list, (layout.meta["filename"], layout.meta["md5"])):
        path = folder / file
        if not path.is_file():
            return f"the file {path.relative_to(root)} is missing"
        try:
            with path.open("rb") as content:
                actual = hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        except OSError as error:
            return str(error)
        if actual != expected:
            return f"the file {path.relative_to(root)} is damaged or not the published one: its MD5 is {actual}, must be {expected}"
    return ""
