"""``dfkd-fast evaluate``: accuracy of weights on labelled images, and agreement with the teacher."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from dfkd_fast import distributed
from dfkd_fast.choices import PrecisionName
from dfkd_fast.console import print_line, print_table
from dfkd_fast.data import DATA_SETS, DataSettings, evaluation_batches
from dfkd_fast.engine.precision import Precision
from dfkd_fast.errors import DfkdError, unknown
from dfkd_fast.evaluation import (
    ClassificationMetrics,
    Evaluation,
    SegmentationMetrics,
    check_readable,
    evaluate,
    evaluate_segmentation,
    iou_by_class,
)
from dfkd_fast.files import check_output, replacing
from dfkd_fast.log import LOGGER

from .candidates import Candidate, EvaluationRequest, candidates
from .segmentation import print_iou

__all__ = [
    "Evaluated",
    "EvaluatedClassifier",
    "EvaluatedSegmenter",
    "check_image_files",
    "evaluate_and_print",
    "evaluate_weights",
]


@dataclass(frozen=True)
class Evaluated:
    """Evaluation of one weight file."""

    weights: str
    role: str
    model: str
    count: int
    """Number of images evaluated."""
    images: str
    """"test images", or for example "5,000 held-out training images" (``data.holdout``)."""
    images_per_second: float
    """Throughput of the pass, which networks with the same input transform share."""
    seconds: dict[str, float]
    """Seconds of that pass: ``total``, ``decode``, ``network``."""
    agreement: dict[str, Any] | None
    """Agreement with the first teacher, or the first network: ``reference``, ``top1`` in percent, ``mean_kl`` in nats."""
    unreadable: list[str]
    """Files that could not be decoded, with the reason."""


@dataclass(frozen=True)
class EvaluatedClassifier(Evaluated):
    """Evaluation of a classifier; accuracies in percent."""

    top1: float
    top5: float


@dataclass(frozen=True)
class EvaluatedSegmenter(Evaluated):
    """Evaluation of a segmenter; metrics in percent."""

    miou: float
    pixel_accuracy: float
    iou: dict[str, float | None]
    """IoU by class; None for a class that occurs nowhere."""


def evaluate_and_print(request: EvaluationRequest, device: torch.device, console: Console, json_file: Path | None = None) -> None:
    """Evaluate networks, print the metrics and optionally write them to a JSON file; the first process prints and writes.

    Raises:
        DfkdError: as :func:`evaluate_weights`, or the JSON file cannot be written, or is one of the weight files.
    """
    if json_file is not None:
        check_output("--json", json_file)
        if json_file.exists() and any(target.exists() and target.samefile(json_file) for target in request.targets):
            raise DfkdError(f"--json {json_file}: would overwrite a file to evaluate")
    results = evaluate_weights(request, device, console)
    if distributed.rank() > 0:
        return
    classified = [result for result in results if isinstance(result, EvaluatedClassifier)]
    segmented = [result for result in results if isinstance(result, EvaluatedSegmenter)]
    if classified:
        rows = [(*_which(one), f"{one.top1:.2f} %", f"{one.top5:.2f} %", _counted(one)) for one in classified]
        print_table(console, ("weights", "role", "model", "top-1", "top-5", "images"), rows)
    if segmented:
        rows = [(*_which(one), f"{one.miou:.2f} %", f"{one.pixel_accuracy:.2f} %", str(one.count)) for one in segmented]
        print_table(console, ("weights", "role", "model", "mIoU", "pixel accuracy", "images"), rows)
        print_iou(console, {one.weights: one.iou for one in segmented})
    for result in results:
        if result.agreement is not None:
            agreement, what = result.agreement, "pixels" if result in segmented else "images"
            print_line(
                console,
                f"{result.weights} agrees with {agreement['reference']} on {agreement['top1']:.2f} % of the {what};"
                f" mean KL {agreement['mean_kl']:.4f} nats",
            )
    for speed in dict.fromkeys(_speed(result) for result in results):
        print_line(console, speed)
    if json_file is not None:
        metrics = [asdict(result) for result in results]
        with replacing(json_file) as part:
            part.write_text(json.dumps(metrics if len(metrics) > 1 else metrics[0], indent=2) + "\n")


def _which(result: Evaluated) -> tuple[str, str, str]:
    return result.weights, result.role, result.model


def _counted(result: Evaluated) -> str:
    return str(result.count) if result.images == "test images" else result.images


def _speed(result: Evaluated) -> str:
    seconds, skipped = result.seconds, f"; {len(result.unreadable)} files skipped" if result.unreadable else ""
    return (
        f"{result.count} images in {seconds['total']:.1f} s, {result.images_per_second:.1f} images/s:"
        f" {seconds['decode']:.1f} s waiting for data, {seconds['network']:.1f} s in the networks{skipped}"
    )


def check_image_files(name: str) -> None:
    """Raise a :class:`DfkdError` unless a data set of that name consists of labelled image files."""
    if name not in (names := [known for known, row in DATA_SETS.items() if row.image_files]):
        raise DfkdError(f"--data: {unknown('data set of image files', name, names)}")


def evaluate_weights(request: EvaluationRequest, device: torch.device, console: Console) -> list[Evaluated]:
    """Evaluate networks; those with the same input transform share one pass over the data.

    Returns:
        One result per network, in the order of the request.

    Raises:
        DfkdError: nothing to evaluate, an unknown network or data folder, or images that cannot be decoded.
    """

    log = partial(LOGGER.warning, "%s")
    requested = list(candidates(request, log))
    passes: dict[DataSettings, list[Candidate]] = {}
    for candidate in requested:
        passes.setdefault(candidate.data, []).append(candidate)
    if len(passes) > 1:
        log("these networks have different input transforms or held-out images: one pass each, and no agreement between them")
    results: dict[str, Evaluated] = {}
    for data, together in passes.items():
        results |= _one_pass(data, together, request.precision, device, console, log)
    return [results[candidate.name] for candidate in requested]


def _is_silent(console: Console) -> bool:
    return not console.is_terminal or console.quiet or not LOGGER.isEnabledFor(logging.INFO)


def _one_pass(
    data: DataSettings,
    candidates: Sequence[Candidate],
    precision: PrecisionName,
    device: torch.device,
    console: Console,
    log: Callable[[str], None],
) -> dict[str, Evaluated]:
    networks = {one.name: one.network.to(device, memory_format=torch.channels_last) for one in candidates}  # type: ignore[call-overload]
    lowered = Precision(precision, device)
    for network in networks.values():
        lowered.keep_logits_in_float32(network, torch.zeros(1, data.channels, data.image_size, data.image_size, device=device))
    reference = next((one.name for one in candidates if one.role == "teacher"), candidates[0].name)
    images = torch.float16 if precision == "fp16" else torch.float32
    batches = evaluation_batches(data, device, images, rank=distributed.rank(), world_size=distributed.world_size(), log=log)
    with Progress(console=console, transient=True, disable=_is_silent(console)) as progress:
        bar = progress.add_task("images", total=batches.count)
        options: dict[str, Any] = {
            "reference": reference,
            "autocast": lowered.autocast,
            "on_batch": lambda count: progress.advance(bar, count),
        }
        done: Evaluation[ClassificationMetrics] | Evaluation[SegmentationMetrics]
        if data.task == "segmentation":
            done = evaluate_segmentation(networks, batches, device, num_classes=data.num_classes, **options)
        else:
            done = evaluate(networks, batches, device, **options)
    check_readable(done.unreadable, done.count, data)
    agreements = {one.network: {name: value for name, value in asdict(one).items() if name != "network"} for one in done.agreements}

    def result_of(one: Candidate, metrics: ClassificationMetrics | SegmentationMetrics) -> Evaluated:
        common: dict[str, Any] = {
            "weights": one.name,
            "role": one.role,
            "model": one.model,
            "count": done.count,
            "images": data.evaluated_on,
            "images_per_second": done.images_per_second,
            "seconds": done.seconds,
            "agreement": agreements.get(one.name),
            "unreadable": done.unreadable,
        }
        if isinstance(metrics, SegmentationMetrics):
            iou = iou_by_class(data, metrics)
            return EvaluatedSegmenter(**common, miou=metrics.miou, pixel_accuracy=metrics.pixel_accuracy, iou=iou)
        return EvaluatedClassifier(**common, top1=metrics.top1, top5=metrics.top5)

    return {one.name: result_of(one, done.networks[one.name]) for one in candidates}
