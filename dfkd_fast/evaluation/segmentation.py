"""Metrics of segmentation networks on images with per-pixel labels, and their agreement with a reference network."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_confusion_matrix

from dfkd_fast.errors import DfkdError
from dfkd_fast.labels import IGNORE_INDEX

from .passes import Evaluation, run_pass

__all__ = ["SegmentationMetrics", "evaluate_segmentation", "mean_iou"]


@dataclass(frozen=True)
class SegmentationMetrics:
    """Metrics of a segmentation network over all labeled pixels, in percent."""

    miou: float
    """Mean of ``iou`` over the classes that occur."""
    iou: tuple[float | None, ...]
    """Intersection over union by class; None for classes that occur neither in labels nor in predictions."""
    pixel_accuracy: float
    """Percentage of labeled pixels with a correct prediction."""


def evaluate_segmentation(
    networks: Mapping[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str = "cpu",
    *,
    num_classes: int,
    reference: str | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    on_batch: Callable[[int], None] = lambda images: None,
) -> Evaluation[SegmentationMetrics]:
    """Evaluates segmentation networks in one pass over the images; see :func:`evaluate`.

    The metrics are computed from one confusion matrix over all pixels except those with label IGNORE_INDEX. Agreement between
    networks needs no labels and is over all pixels.

    Args:
        networks: networks by name, images (B, C, H, W) → logits (B, num_classes, h, w) in any form that
            :func:`~dfkd_fast.surgery.get_logits` accepts; logits are bilinearly interpolated to the size of the labels.
        batches: iterable of images (B, C, H, W) and labels (B, H, W).
        device, reference, autocast, on_batch: see :func:`evaluate`.
        num_classes: number of classes of every network.

    Returns:
        The metrics of every network, agreements, number of images, and times.

    Raises:
        DfkdError: see :func:`evaluate`; or no pixel is labeled.
    """
    return run_pass(
        networks,
        batches,
        device,
        partial(_ConfusionMatrix, num_classes),
        classes=num_classes,
        reference=reference,
        autocast=autocast,
        on_batch=on_batch,
    )


def mean_iou(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], num_classes: int, device: torch.device | str = "cpu") -> float:
    """Returns the mIoU of a network in percent, over the classes that occur; see :func:`evaluate_segmentation`."""
    return evaluate_segmentation({"network": network}, batches, device, num_classes=num_classes).networks["network"].miou


class _ConfusionMatrix:
    """Accumulates a confusion matrix with labels as rows and predictions as columns; exact up to 2⁵³ pixels."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.sums = torch.zeros(num_classes, num_classes, dtype=torch.float64, device=device)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        classes = len(self.sums)
        self.sums += multiclass_confusion_matrix(logits.argmax(1), labels, classes, ignore_index=IGNORE_INDEX, validate_args=False)

    def compute(self, count: int) -> SegmentationMetrics:
        if not self.sums.any():
            raise DfkdError("no pixels to evaluate on: all are unlabeled")
        correct = self.sums.diagonal()
        iou = 100 * correct / (self.sums.sum(0) + self.sums.sum(1) - correct)
        return SegmentationMetrics(
            miou=iou.nanmean().item(),
            iou=tuple(None if value.isnan() else value.item() for value in iou),
            pixel_accuracy=(100 * correct.sum() / self.sums.sum()).item(),
        )
