"""What segmenters are worth on images with a label a pixel, and how far they agree."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_confusion_matrix

from dfkd_fast.errors import DfkdError
from dfkd_fast.settings import VOID

from .passes import Evaluation, run_pass

__all__ = ["SegmentationFigures", "evaluate_segmentation", "mean_iou"]


@dataclass(frozen=True)
class SegmentationFigures:
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
) -> Evaluation[SegmentationFigures]:
    """What :func:`evaluate` does, for a label a pixel: figures from one confusion matrix of all pixels, those that are VOID left out.

    Agreement between networks asks for no labels, and is of all pixels.

    Args:
        networks: images (B, C, H, W) → logits (B, num_classes, h, w), resized bilinearly to the labels' size, in any form that
            ``logits_of`` takes, by name.
        batches: (images, labels (B, H, W)).
        device, reference, autocast, on_batch: as there.
        num_classes: of every network.

    Raises:
        DfkdError: as there, or no pixel has a label.
    """

    def confusion(logits: Tensor, labels: Tensor) -> Tensor:
        found = multiclass_confusion_matrix(logits.argmax(1), labels, num_classes, ignore_index=VOID, validate_args=False)
        return found.flatten().double()  # exact, up to 2⁵³ pixels

    return run_pass(
        networks,
        batches,
        device,
        confusion,
        num_classes**2,
        lambda found, _: _figures(found.view(num_classes, num_classes)),
        classes=num_classes,
        reference=reference,
        autocast=autocast,
        on_batch=on_batch,
    )


def mean_iou(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], num_classes: int, device: torch.device | str = "cpu") -> float:
    """Intersection over union in percent, the mean over the classes that occur; see :func:`evaluate_segmentation`."""
    return evaluate_segmentation({"network": network}, batches, device, num_classes=num_classes).networks["network"].miou


def _figures(confusion: Tensor) -> SegmentationFigures:
    """Of a matrix of labels (rows) and predictions."""
    if not confusion.any():
        raise DfkdError("no pixels to evaluate on: none has a label")
    right = confusion.diagonal()
    iou = 100 * right / (confusion.sum(0) + confusion.sum(1) - right)
    return SegmentationFigures(
        miou=iou.nanmean().item(),
        iou=tuple(None if value.isnan() else value.item() for value in iou),
        pixel_accuracy=(100 * right.sum() / confusion.sum()).item(),
    )
