"""What classifiers are worth on labelled images, and how far they agree."""

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
    """One network's accuracy, in percent."""

    top1: float
    top5: float
    """The label is among the five largest logits; among all, where there are fewer."""


def evaluate(
    networks: Mapping[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str = "cpu",
    *,
    reference: str | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    on_batch: Callable[[int], None] = lambda images: None,
) -> Evaluation[ClassificationMetrics]:
    """Show every image once to all networks, in evaluation mode; every module is left in the mode it was in.

    Under torchrun each process brings its share of the images, and all get the figures of the whole.

    Args:
        networks: images (B, C, H, W) → logits (B, classes), in any form that ``get_logits`` takes, by name.
        batches: (images, labels (B,)).
        device: where the networks are.
        reference: the network that the others are set against; none by default.
        autocast: makes the context for a forward pass.
        on_batch: told how many images a batch had.

    Raises:
        DfkdError: there are no images at all, in any process, a network's output is no logits or no number, or a label none of
            its classes.
    """
    return run_pass(networks, batches, device, _TopK, classes=None, reference=reference, autocast=autocast, on_batch=on_batch)


def top1_accuracy(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | str = "cpu") -> float:
    """Percentage of images whose largest logit is their label's; see :func:`evaluate`."""
    return evaluate({"network": network}, batches, device).networks["network"].top1


class _TopK:
    """How many labels are the largest logit's, and how many are among the five largest's."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        classes = logits.shape[1]
        for index, among in enumerate((1, min(5, classes))):
            right = multiclass_stat_scores(logits, labels, classes, top_k=among, average="micro", validate_args=False)[0]
            self.sums[index] += right

    def compute(self, count: int) -> ClassificationMetrics:
        return ClassificationMetrics(*(100 * self.sums / count).tolist())
