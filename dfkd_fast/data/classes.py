"""The classes of the segmentation sets: what they are called, how they are painted, and their numbers in label files."""

from dataclasses import dataclass

import numpy as np

from dfkd_fast.labels import IGNORE_INDEX

__all__ = ["CAMVID", "NYUV2", "SHAPES", "UNKNOWN", "Classes", "numbered_classes"]

Colour = tuple[int, int, int]
UNKNOWN = -1
"""Of a number in a label file: neither a class nor void."""


@dataclass(frozen=True)
class Classes:
    """The classes of a data set, in the order of its labels."""

    colours: dict[str, Colour]
    """RGB, by name."""
    first: int = 0
    """The first class's number in label files; the others follow."""
    void: tuple[int, ...] = (255,)
    """The numbers in label files of pixels without a label."""

    def table(self) -> np.ndarray:
        """The labels, int16 (256,), of the numbers in label files: 0 to C − 1, IGNORE_INDEX or UNKNOWN."""
        labels = np.full(256, UNKNOWN, np.int16)
        labels[list(self.void)] = IGNORE_INDEX
        labels[self.first : self.first + len(self.colours)] = np.arange(len(self.colours))
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
    void=(11, 255),
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
    first=1,
    void=(0, 255),
)
SHAPES = Classes({"background": (128, 128, 128), "circle": (200, 60, 60), "square": (60, 170, 60), "triangle": (70, 70, 210)})


def numbered_classes(count: int) -> Classes:
    """Classes that are called by their numbers, in PASCAL VOC's colours."""
    return Classes({str(label): _voc_colour(label) for label in range(count)})


def _voc_colour(label: int) -> Colour:
    """The bits of a label, dealt in turn to red, green and blue, the highest places first."""
    red, green, blue = (sum((label >> 3 * place + channel & 1) << 7 - place for place in range(8)) for channel in range(3))
    return red, green, blue
