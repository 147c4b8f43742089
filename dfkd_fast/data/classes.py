"""Classes of the segmentation data sets: names, colours, and IDs in label files."""

from dataclasses import dataclass

import numpy as np

from dfkd_fast.labels import IGNORE_INDEX

__all__ = ["CAMVID", "NYUV2", "SHAPES", "UNKNOWN", "Classes", "numbered_classes"]

Colour = tuple[int, int, int]
UNKNOWN = -1
"""Label of an ID in a label file that is neither a class nor ignored."""


@dataclass(frozen=True)
class Classes:
    """The classes of a data set, in the order of its labels."""

    colours: dict[str, Colour]
    """RGB colours by class name."""
    first_id: int = 0
    """ID of the first class in label files; the other classes have consecutive IDs."""
    ignored_ids: tuple[int, ...] = (255,)
    """IDs of unlabeled pixels in label files."""

    def lookup_table(self) -> np.ndarray:
        """Returns the label for every ID in a label file, int16 (256,): 0 to C − 1, IGNORE_INDEX or UNKNOWN."""
        labels = np.full(256, UNKNOWN, np.int16)
        labels[list(self.ignored_ids)] = IGNORE_INDEX
        labels[self.first_id : self.first_id + len(self.colours)] = np.arange(len(self.colours))
        return labels


CAMVID = Classes(
    {
        "sky": (128, 128, 128),
        "building": (128, 0, 0),
        "pole": (192, 192, 128),
        "road": (128, 64, 128),
        "pavement": (60, 40, 222),
        "tree": (128, 128, 0),
        "sign": (192, 128, 128),
        "fence": (64, 64, 128),
        "car": (64, 0, 128),
        "pedestrian": (64, 64, 0),
        "bicyclist": (0, 128, 192),
    },
    ignored_ids=(11, 255),
)
NYUV2 = Classes(
    {
        "bed": (0, 0, 255),
        "books": (233, 89, 48),
        "ceiling": (0, 218, 0),
        "chair": (149, 0, 240),
        "floor": (222, 241, 24),
        "furniture": (255, 206, 206),
        "objects": (0, 224, 229),
        "picture": (106, 136, 204),
        "sofa": (117, 29, 41),
        "table": (240, 35, 235),
        "tv": (0, 167, 156),
        "wall": (249, 139, 0),
        "window": (225, 229, 194),
    },
    first_id=1,
    ignored_ids=(0, 255),
)
SHAPES = Classes({"background": (128, 128, 128), "circle": (200, 60, 60), "square": (60, 170, 60), "triangle": (70, 70, 210)})


def numbered_classes(count: int) -> Classes:
    """Returns ``count`` classes named by their numbers, with PASCAL VOC's colours."""
    return Classes({str(label): _voc_colour(label) for label in range(count)})


def _voc_colour(label: int) -> Colour:
    """Returns PASCAL VOC's colour: the label's bits go to red, green and blue in turn, most significant bit of the channel first."""
    red, green, blue = (sum((label >> 3 * bit + channel & 1) << 7 - bit for bit in range(8)) for channel in range(3))
    return red, green, blue
