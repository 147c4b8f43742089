"""Throughput of the image loaders, alone and followed by a network."""

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
    """Throughput of one loader in one stage."""

    stage: str
    """``decode``: batches are loaded and discarded; ``end to end``: EfficientNet-Lite0 evaluates them in float32."""
    loader: str
    workers: int
    images: int
    images_per_second: float
    """Median over the timed passes."""
    times_torchvision: float
    """Median of the ratios of interleaved passes."""
    lower: float
    upper: float
    """Quartiles of these ratios."""
    turns: int
    provenance: Provenance = field(kw_only=True, metadata={"columns": LOADERS})


def measure(root: Path, workers: int, images: int, turns: int, command: str) -> list[Row]:
    """Time both loaders, in interleaved passes, on files that must be resized; returns a row for each stage and loader.

    Raises:
        DfkdError: There are no such files, or the loaders return different labels or pixels.
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
                if turn:  # the first pass is the warm-up
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
    """Return ``images`` files that must be resized; files are repeated if there are fewer."""
    everything = list_test_images("imagenet", root)
    large = [index for index, path in enumerate(everything.paths) if min(Image.open(path).size) > 256]
    if not large:
        raise DfkdError(f"--data-root {root}: no image has a shorter side above 256 pixels")
    return everything.take([large[index % len(large)] for index in range(images)])


def _check_same(loaders: dict[str, Batches], std: float) -> None:
    """Check that each image's mean absolute difference between the loaders is within rounding."""
    by_label = [
        {int(label): image.clone() for images, labels in batches for image, label in zip(images, labels, strict=True)}
        for batches in loaders.values()
    ]
    ours, theirs = by_label
    if ours.keys() != theirs.keys():
        raise DfkdError("the loaders return different labels")
    worst = max(float((ours[label] - theirs[label]).abs().mean()) * 255 * std for label in ours)
    if worst > 0.5:
        raise DfkdError(f"the loaders' images differ by {worst:.2f} of 255 levels on average")
