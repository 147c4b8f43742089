"""A data set, opened once, on which networks are tested again and again."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from dfkd_fast import distributed
from dfkd_fast.data import DataSettings, class_names, evaluation_batches
from dfkd_fast.errors import DfkdError

from .accuracy import evaluate
from .passes import Evaluation
from .segmentation import SegmentationMetrics, evaluate_segmentation

__all__ = ["Evaluator", "check_readable", "iou_by_class"]

NAMED = 5
"""Unreadable files that an error names."""


class Evaluator:
    """What a training calls for a network's accuracy, or mIoU, in percent.

    Args:
        data: what it is tested on.
        device: where networks are.
        log: told, in a line each, what a reader of the figures must know.

    Raises:
        DfkdError: files that cannot be decoded, where that is an error and already known.
    """

    def __init__(self, data: DataSettings, device: torch.device, log: Callable[[str], None] = lambda note: None) -> None:
        self.data = data
        self.device = device
        self.batches = evaluation_batches(data, device, rank=distributed.rank(), world_size=distributed.world_size(), log=log)
        # Images with a label a pixel are read by now; others tell in the pass.
        bad = distributed.all_gather(list(self.batches.unreadable))
        check_readable(bad, int(distributed.all_reduce_sum(torch.tensor(self.batches.count))) - len(bad), data)

    def __call__(self, network: nn.Module) -> float:
        """Test a network on all images."""
        if self.data.task == "segmentation":
            return self._segmented({"network": network}).networks["network"].miou
        found = evaluate({"network": network}, self.batches, self.device)
        check_readable(found.unreadable, found.count, self.data)
        return found.networks["network"].top1

    def iou(self, networks: Mapping[str, nn.Module]) -> dict[str, dict[str, float | None]]:
        """IoU in percent by network and class, None of a class that occurs nowhere; nothing for classifiers."""
        if self.data.task != "segmentation":
            return {}
        return {name: iou_by_class(self.data, found) for name, found in self._segmented(networks).networks.items()}

    def _segmented(self, networks: Mapping[str, nn.Module]) -> Evaluation[SegmentationMetrics]:
        return evaluate_segmentation(networks, self.batches, self.device, num_classes=self.data.num_classes)


def iou_by_class(data: DataSettings, figures: SegmentationMetrics) -> dict[str, float | None]:
    """A network's IoU in percent by the names of the data set's classes."""
    return dict(zip(class_names(data), figures.iou, strict=True))


def check_readable(bad: Sequence[str], count: int, data: DataSettings) -> None:
    """Raise a :class:`DfkdError` for files that could not be decoded, beside so many that could, where that is an error."""
    if bad and data.strict:
        named = ", ".join(bad[:NAMED]) + (f" and {len(bad) - NAMED} more" if len(bad) > NAMED else "")
        raise DfkdError(f"{len(bad)} of {count + len(bad)} images cannot be decoded: {named}; data.strict = false leaves them out")
