"""The loaders of image files beside each other: what decoding costs, and what is left of that behind a network."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from dfkd_fast.data import Batches, DaliBatches, FolderBatches, ImageList, list_test_images, resolve_eval_transform
from dfkd_fast.errors import DfkdError
from dfkd_fast.evaluation import evaluate
from dfkd_fast.models import build_model

from .provenance import LOADERS, Provenance, measured_on

__all__ = ["Row", "measure"]

BATCH = 25
MODEL = "efficientnet_lite0"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """One loader, in one stage."""

    stage: str
    """``decode``: batches are made and thrown away; ``end to end``: EfficientNet-Lite0 sees them in float32."""
    loader: str
    workers: int
    images: int
    images_per_second: float
    """Median of the turns."""
    times_torchvision: float
    """The median of the turns' ratios."""
    lower: float
    upper: float
    """Their quartiles."""
    turns: int
    provenance: Provenance = field(kw_only=True, metadata={"columns": LOADERS})


def measure(root: Path, workers: int, images: int, turns: int, command: str) -> list[Row]:
    """Time both loaders in turns on files of original size, after checking that they serve the same.

    Raises:
        DfkdError: there are no such files, or the loaders serve different pixels.
    """
    listing, view = _originals(root, images), resolve_eval_transform(MODEL)
    loaders: dict[str, Batches] = {
        "torchvision": FolderBatches(listing, view, BATCH, workers),
        "dali": DaliBatches(listing, view, BATCH, workers, CPU, torch.float32),
    }
    _check_same(loaders, view.std[0])
    network = build_model(MODEL, 1000, 3).to(memory_format=torch.channels_last)
    stages: dict[str, Callable[[Batches], object]] = {
        "decode": lambda batches: sum(len(labels) for _, labels in batches),
        "end to end": lambda batches: evaluate({MODEL: network}, batches),
    }
    provenance = measured_on(CPU, command)
    rows = []
    for stage, work in stages.items():
        seconds: dict[str, list[float]] = {name: [] for name in loaders}
        for turn in range(turns + 1):
            for name, batches in loaders.items():
                begin = time.perf_counter()
                work(batches)
                if turn:  # the first one warms up
                    seconds[name].append(time.perf_counter() - begin)
        for name, measured in seconds.items():
            ratios = [theirs / ours for theirs, ours in zip(seconds["torchvision"], measured, strict=True)]
            lower, middle, upper = statistics.quantiles(ratios, n=4) if turns > 1 else 3 * ratios
            rows.append(
                Row(
                    stage=stage,
                    loader=name,
                    workers=workers,
                    images=images,
                    images_per_second=round(images / statistics.median(measured), 1),
                    times_torchvision=round(middle, 3),
                    lower=round(lower, 3),
                    upper=round(upper, 3),
                    turns=turns,
                    provenance=provenance,
                )
            )
    return rows


def _originals(root: Path, images: int) -> ImageList:
    """So many files that must be resized, repeated if there are fewer."""
    whole = list_test_images("imagenet", root)
    large = [index for index, path in enumerate(whole.paths) if min(Image.open(path).size) > 256]
    if not large:
        raise DfkdError(f"--data-root {root}: no image has a shorter side above 256 pixels")
    return whole.take([large[index % len(large)] for index in range(images)])


def _check_same(loaders: dict[str, Batches], std: float) -> None:
    """The mean difference of pixels is within rounding, image by image."""
    served = [
        {int(label): image.clone() for images, labels in batches for image, label in zip(images, labels, strict=True)}
        for batches in loaders.values()
    ]
    ours, theirs = served
    if ours.keys() != theirs.keys():
        raise DfkdError("the loaders serve different labels")
    worst = max(float((ours[label] - theirs[label]).abs().mean()) * 255 * std for label in ours)
    if worst > 0.5:
        raise DfkdError(f"the loaders' pixels differ by {worst:.2f} levels in the mean")
