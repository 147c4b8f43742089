"""Accuracy of classifiers, and their agreement with a reference network."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_stat_scores

from .passes import Evaluation, run_pass

__all__ = ["ClassificationMetrics", "evaluate", "top1_accuracy"]


@dataclass(frozen=True)
class ClassificationMetrics:
    """Accuracy of a classifier, in percent."""

    top1: float
    top5: float
    """Top-5 accuracy; top-C for fewer than five classes."""


def evaluate(
    networks: Mapping[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str = "cpu",
    *,
    reference: str | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    on_batch: Callable[[int], None] = lambda images: None,
) -> Evaluation[ClassificationMetrics]:
    """Evaluates classifiers in one pass over the images, in evaluation mode; the mode of every module is restored.

    Under torchrun, every process passes its share of the images, and the metrics of all images are returned in every process.

    Args:
        networks: classifiers by name, images (B, C, H, W) → logits (B, classes) in any form that
            :func:`~dfkd_fast.surgery.get_logits` accepts.
        batches: iterable of images (B, C, H, W) and labels (B,).
        device: device of the networks.
        reference: name of the network with which the agreement of the others is measured; None for no agreement.
        autocast: returns the autocast context of a forward pass.
        on_batch: called with the number of images after each batch.

    Returns:
        The metrics of every network, agreements, number of images, and times.

    Raises:
        DfkdError: no process has images, an output has no logits of shape (B, classes) or is not finite, or a label is not a class
            of the networks.
    """
    return run_pass(networks, batches, device, _TopK, classes=None, reference=reference, autocast=autocast, on_batch=on_batch)


def top1_accuracy(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | str = "cpu") -> float:
    """Returns the top-1 accuracy of a classifier in percent; see :func:`evaluate`."""
    return evaluate({"network": network}, batches, device).networks["network"].top1


class _TopK:
    """Counts the labels that are the top-1 prediction and those among the top-5 predictions."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        classes = logits.shape[1]
        for index, k in enumerate((1, min(5, classes))):
            correct = multiclass_stat_scores(logits, labels, classes, top_k=k, average="micro", validate_args=False)[0]
            self.sums[index] += correct

    def compute(self, count: int) -> ClassificationMetrics:
        return ClassificationMetrics(*(100 * self.sums / count).tolist())
