"""Segmentation metrics, compared with scikit-learn's confusion matrix and PyTorch's losses."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix
from torch import Tensor, nn

from dfkd_fast import DfkdError
from dfkd_fast.evaluation import evaluate_segmentation, mean_iou
from dfkd_fast.labels import IGNORE_INDEX

CLASSES = 6
Batch = tuple[Tensor, Tensor]


class Identity(nn.Module):
    """Returns the images as logits."""

    def forward(self, x: Tensor) -> Any:
        return x


class ReturnsDict(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"aux": -x, "out": x}


class Shifted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * torch.randn(x.shape[1:2], generator=torch.Generator().manual_seed(0))[:, None, None]


def examples(count: int = 7, size: tuple[int, int] = (5, 9), seed: int = 0) -> Batch:
    """Returns logits and labels: a quarter unlabeled, class 3 in labels only, class 4 nowhere, class 5 in predictions only."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, CLASSES, *size, generator=generator)
    logits[:, 3:5] = -10
    labels = torch.randint(0, 4, (count, *size), generator=generator)
    return logits, labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.25, IGNORE_INDEX)


def expected(batches: Sequence[Batch]) -> tuple[list[float], float]:
    """Returns the IoU by class, NaN for classes that do not occur, and the pixel accuracy, in percent."""
    predicted = np.concatenate([logits.argmax(1).flatten().numpy() for logits, _ in batches])
    labels = np.concatenate([labels.flatten().numpy() for _, labels in batches])
    matrix = confusion_matrix(labels[labels != IGNORE_INDEX], predicted[labels != IGNORE_INDEX], labels=range(CLASSES))
    intersections, unions = np.diag(matrix), matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
    iou = [100 * intersection / union if union else math.nan for intersection, union in zip(intersections, unions, strict=True)]
    return iou, 100 * intersections.sum() / matrix.sum()


@pytest.mark.parametrize("network", [Identity(), ReturnsDict()])
def test_the_metrics_equal_those_of_scikit_learns_confusion_matrix(network: nn.Module) -> None:
    batches = [examples(), examples(3, seed=1)]
    metrics = evaluate_segmentation({"a": network}, batches, num_classes=CLASSES).networks["a"]
    iou, pixel_accuracy = expected(batches)
    assert [math.nan if value is None else value for value in metrics.iou] == pytest.approx(iou, rel=1e-12, nan_ok=True)
    assert [index for index, value in enumerate(metrics.iou) if value is None] == [4]
    assert (metrics.iou[3], metrics.iou[5]) == (0, 0)
    assert metrics.miou == pytest.approx(np.nanmean(iou), rel=1e-12)
    assert metrics.pixel_accuracy == pytest.approx(pixel_accuracy, rel=1e-12)
    assert mean_iou(network, batches, CLASSES) == metrics.miou


def test_a_class_that_does_not_occur_is_not_part_of_the_mean() -> None:
    labels = torch.tensor([[[0, 0, 1, IGNORE_INDEX]]])
    logits = F.one_hot(torch.tensor([[[0, 1, 1, 2]]]), 4).movedim(-1, 1).float()
    metrics = evaluate_segmentation({"a": Identity()}, [(logits, labels)], num_classes=4).networks["a"]
    assert list(metrics.iou) == [50, 50, None, None]
    assert metrics.miou == 50
    assert metrics.pixel_accuracy == pytest.approx(200 / 3)


def test_the_metrics_do_not_depend_on_batching() -> None:
    logits, labels = examples()
    mixed = [examples(2, (4, 4), seed=1), examples(1, (7, 3), seed=2)]
    whole = evaluate_segmentation({"a": Identity()}, [(logits, labels), *mixed], num_classes=CLASSES)
    parts = zip(logits.split(3), labels.split(3), strict=True)
    again = evaluate_segmentation({"a": Identity()}, [*mixed, *parts], num_classes=CLASSES)
    assert whole.networks == again.networks
    assert whole.count == again.count == 10
    assert whole.networks["a"].miou == pytest.approx(np.nanmean(expected([(logits, labels), *mixed])[0]), rel=1e-12)


def test_smaller_logits_are_interpolated_to_the_labels_size() -> None:
    small, labels = torch.randn(2, CLASSES, 4, 3, generator=torch.Generator().manual_seed(0)), examples(2, (9, 10))[1]
    large = F.interpolate(small, (9, 10), mode="bilinear", align_corners=False)
    metrics = [evaluate_segmentation({"a": Identity()}, [(logits, labels)], num_classes=CLASSES).networks for logits in (small, large)]
    assert metrics[0] == metrics[1]


def test_agreement_includes_unlabeled_pixels() -> None:
    logits, labels = examples()
    batches = list(zip(logits.split(2), labels.split(2), strict=True))
    evaluation = evaluate_segmentation({"student": Shifted(), "teacher": Identity()}, batches, num_classes=CLASSES, reference="teacher")
    (agreement,) = evaluation.agreements
    assert (agreement.network, agreement.reference) == ("student", "teacher")
    student = Shifted()(logits)
    same = (student.argmax(1) == logits.argmax(1)).double().mean().item()
    assert agreement.top1 == pytest.approx(100 * same, rel=1e-12)
    assert 0 < same < 1
    divergence = F.kl_div(student.double().log_softmax(1), logits.double().log_softmax(1), reduction="none", log_target=True).sum(1)
    assert agreement.mean_kl == pytest.approx(divergence.mean().item(), rel=1e-5)
    without_reference = evaluate_segmentation({"student": Shifted()}, batches, num_classes=CLASSES)
    assert without_reference.networks["student"] == evaluation.networks["student"]
    assert without_reference.agreements == []


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_non_finite_output_is_an_error(value: float) -> None:
    logits, labels = examples(2, (4, 4))
    logits[1, 2, 3, 0] = value
    with pytest.raises(DfkdError, match="network a: its output is NaN or infinite on 1 of 32 pixels"):
        evaluate_segmentation({"a": Identity()}, [(logits, labels)], num_classes=CLASSES)


@pytest.mark.parametrize("label", [CLASSES, 255, -1])
def test_labels_that_are_neither_classes_nor_ignore_index_are_refused(label: int) -> None:
    logits, labels = examples(2, (4, 4))
    labels[0, 1, 2:] = label
    with pytest.raises(DfkdError, match="network a: 2 of 32 labels are not among its classes"):
        evaluate_segmentation({"a": Identity()}, [(logits, labels)], num_classes=CLASSES)


class Returns(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.zeros(2, 7, 4, 4), r"network a must return logits \(B, 6, H, W\), not \(2, 7, 4, 4\)"),
        (torch.zeros(2, 6), r"network a must return logits \(B, 6, H, W\), not \(2, 6\)"),
        ({"scores": torch.zeros(2, 6, 4, 4)}, "network a must return logits: .* under 'out' or 'logits', not dict with the keys 'scores'"),
    ],
)
def test_outputs_that_are_not_logits_of_the_classes_are_refused(output: Any, message: str) -> None:
    with pytest.raises(DfkdError, match=message):
        evaluate_segmentation({"a": Returns(output)}, [examples(2, (4, 4))], num_classes=CLASSES)


def test_evaluation_without_images_or_labels_is_refused() -> None:
    with pytest.raises(DfkdError, match="no images to evaluate on"):
        mean_iou(Identity(), [], CLASSES)
    logits, labels = examples()
    with pytest.raises(DfkdError, match="no pixels to evaluate on: all are unlabeled"):
        mean_iou(Identity(), [(logits, torch.full_like(labels, IGNORE_INDEX))], CLASSES)


def test_the_network_is_evaluated_in_evaluation_mode_and_restored() -> None:
    network = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(CLASSES))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert mean_iou(network, [examples()], CLASSES) == pytest.approx(np.nanmean(expected([examples()])[0]), rel=1e-12)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_every_batch_is_reported() -> None:
    reported: list[int] = []
    evaluation = evaluate_segmentation({"a": Identity()}, [examples(4), examples(1)], num_classes=CLASSES, on_batch=reported.append)
    assert reported == [4, 1]
    assert evaluation.seconds["decode"] + evaluation.seconds["network"] == pytest.approx(evaluation.seconds["total"])
