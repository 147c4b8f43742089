"""Repeated evaluation of networks on one data set."""

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

MAX_NAMES = 5
"""Number of files that an error message lists."""


class Evaluator:
    """Callable that returns a network's top-1 accuracy or mIoU in percent on a data set, which is opened once.

    Args:
        data: recipe section ``[data]``.
        device: device of the networks.
        log: called with one line for each caveat about the metrics.

    Raises:
        DfkdError: the data set cannot be opened, or ``data.strict`` is set and files of a segmentation data set cannot be decoded.
    """

    def __init__(self, data: DataSettings, device: torch.device, log: Callable[[str], None] = lambda note: None) -> None:
        self.data = data
        self.device = device
        self.batches = evaluation_batches(data, device, rank=distributed.rank(), world_size=distributed.world_size(), log=log)
        # Segmentation data sets are in memory by now; others detect unreadable files during the pass.
        unreadable = distributed.all_gather(list(self.batches.unreadable))
        check_readable(unreadable, int(distributed.all_reduce_sum(torch.tensor(self.batches.count))) - len(unreadable), data)

    def __call__(self, network: nn.Module) -> float:
        """Returns the top-1 accuracy or mIoU of a network in percent, over all images of all processes.

        Raises:
            DfkdError: see :func:`evaluate`; or ``data.strict`` is set and files cannot be decoded.
        """
        if self.data.task == "segmentation":
            return self._evaluate_segmentation({"network": network}).networks["network"].miou
        evaluation = evaluate({"network": network}, self.batches, self.device)
        check_readable(evaluation.unreadable, evaluation.count, self.data)
        return evaluation.networks["network"].top1

    def iou(self, networks: Mapping[str, nn.Module]) -> dict[str, dict[str, float | None]]:
        """Returns IoU in percent by network and class name, None for classes that do not occur; an empty dict for classification."""
        if self.data.task != "segmentation":
            return {}
        return {name: iou_by_class(self.data, metrics) for name, metrics in self._evaluate_segmentation(networks).networks.items()}

    def _evaluate_segmentation(self, networks: Mapping[str, nn.Module]) -> Evaluation[SegmentationMetrics]:
        return evaluate_segmentation(networks, self.batches, self.device, num_classes=self.data.num_classes)


def iou_by_class(data: DataSettings, metrics: SegmentationMetrics) -> dict[str, float | None]:
    """Returns a network's IoU in percent by class name, None for classes that do not occur."""
    return dict(zip(class_names(data), metrics.iou, strict=True))


def check_readable(unreadable: Sequence[str], count: int, data: DataSettings) -> None:
    """Raises a :class:`DfkdError` if there are unreadable files and ``data.strict`` is set.

    Args:
        unreadable: files that could not be decoded, each with the reason.
        count: number of images that could be decoded, for the error message.
        data: recipe section ``[data]``.
    """
    if unreadable and data.strict:
        names = ", ".join(unreadable[:MAX_NAMES])
        more = f" and {len(unreadable) - MAX_NAMES} more" if len(unreadable) > MAX_NAMES else ""
        total = count + len(unreadable)
        raise DfkdError(f"{len(unreadable)} of {total} images cannot be decoded: {names}{more}; data.strict = false leaves them out")
