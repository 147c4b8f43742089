"""Top-1 accuracy."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_stat_scores

from dfkd_fast.models import evaluating

__all__ = ["top1_accuracy"]


def top1_accuracy(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | str = "cpu") -> float:
    """Percentage of images whose largest logit is their label's.

    The network is evaluated in evaluation mode; every module of it is left in the mode it was in.

    Args:
        network: images (B, C, H, W) → logits (B, num_classes).
        batches: (images, labels (B,)).
        device: where the network is.

    Raises:
        ValueError: no batch at all.
    """
    right = torch.zeros((), dtype=torch.long, device=device)
    count = 0
    with evaluating(network):
        for images, labels in batches:
            logits = network(images.to(device, non_blocking=True, memory_format=torch.channels_last))
            stats = multiclass_stat_scores(logits, labels.to(device, non_blocking=True), logits.shape[1], average="micro")
            right += stats[0]
            count += len(labels)
    if count == 0:
        raise ValueError("no images to evaluate on")
    return 100.0 * right.item() / count
