"""What segmenters are worth on images with a label a pixel, and how far they agree."""

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
    """One network's figures over all pixels that have a label, in percent."""

    miou: float
    """Of the classes that occur."""
    iou: tuple[float | None, ...]
    """Intersection over union by class; None for one that occurs neither in labels nor in predictions."""
    pixel_accuracy: float


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
    """What :func:`evaluate` does, for a label a pixel: figures from one confusion matrix of all pixels but those of IGNORE_INDEX.

    Agreement between networks asks for no labels, and is of all pixels.

    Args:
        networks: images (B, C, H, W) → logits (B, num_classes, h, w), resized bilinearly to the labels' size, in any form that
            ``get_logits`` takes, by name.
        batches: (images, labels (B, H, W)).
        device, reference, autocast, on_batch: as there.
        num_classes: of every network.

    Raises:
        DfkdError: as there, or no pixel has a label.
    """
    return run_pass(
        networks,
        batches,
        device,
        partial(_Confusion, num_classes),
        classes=num_classes,
        reference=reference,
        autocast=autocast,
        on_batch=on_batch,
    )


def mean_iou(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], num_classes: int, device: torch.device | str = "cpu") -> float:
    """Intersection over union in percent, the mean over the classes that occur; see :func:`evaluate_segmentation`."""
    return evaluate_segmentation({"network": network}, batches, device, num_classes=num_classes).networks["network"].miou


class _Confusion:
    """A matrix of labels (rows) and predictions; exact, up to 2⁵³ pixels."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.sums = torch.zeros(num_classes, num_classes, dtype=torch.float64, device=device)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        classes = len(self.sums)
        self.sums += multiclass_confusion_matrix(logits.argmax(1), labels, classes, ignore_index=IGNORE_INDEX, validate_args=False)

    def compute(self, count: int) -> SegmentationMetrics:
        if not self.sums.any():
            raise DfkdError("no pixels to evaluate on: none has a label")
        right = self.sums.diagonal()
        iou = 100 * right / (self.sums.sum(0) + self.sums.sum(1) - right)
        return SegmentationMetrics(
            miou=iou.nanmean().item(),
            iou=tuple(None if value.isnan() else value.item() for value in iou),
            pixel_accuracy=(100 * right.sum() / self.sums.sum()).item(),
        )
