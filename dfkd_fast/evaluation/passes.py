"""One evaluation pass over labeled images: accumulates the metrics of several networks and their agreement."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast import distributed
from dfkd_fast.errors import DfkdError
from dfkd_fast.kernels import kl_discrepancy
from dfkd_fast.labels import IGNORE_INDEX
from dfkd_fast.surgery import eval_mode, get_logits

__all__ = ["Agreement", "Evaluation", "Metric", "run_pass"]

Element = TypeVar("Element")
Metrics = TypeVar("Metrics", covariant=True)
MIN_SECONDS = 1e-9


@dataclass(frozen=True)
class Agreement:
    """Agreement of a network with a reference network, over images or pixels."""

    network: str
    reference: str
    top1: float
    """Percentage of images or pixels for which both networks predict the same class."""
    mean_kl: float
    """Mean of KL(reference ‖ network) in nats."""


@dataclass(frozen=True)
class Evaluation(Generic[Metrics]):
    """Results of one evaluation pass over the images of all processes."""

    networks: dict[str, Metrics]
    """Metrics by network."""
    agreements: list[Agreement]
    """Agreement of every other network with the reference."""
    count: int
    """Number of images."""
    unreadable: list[str]
    """Files that could not be decoded, each with the reason."""
    seconds: dict[str, float]
    """Times of this process in seconds: ``total``, ``decode`` for waiting for images, and ``network`` for the rest."""

    @property
    def images_per_second(self) -> float:
        """Throughput of the pass: images of all processes per second of this process's total time."""
        return self.count / max(self.seconds["total"], MIN_SECONDS)


class Metric(Protocol[Metrics]):
    """Interface of the accumulators of a network's metrics."""

    sums: Tensor
    """float64 state on the device, summed over the processes before :meth:`compute`."""

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Accumulates a batch.

        Args:
            logits: float32 (B, classes, …), where … is the shape of the labels.
            labels: classes or IGNORE_INDEX, (B,) or (B, H, W).
        """

    def compute(self, count: int) -> Metrics:
        """Returns the metrics over ``count`` images or pixels."""


def run_pass(
    networks: Mapping[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str,
    metric: Callable[[torch.device], Metric[Metrics]],
    *,
    classes: int | None,
    reference: str | None,
    autocast: Callable[[], AbstractContextManager[object]],
    on_batch: Callable[[int], None],
) -> Evaluation[Metrics]:
    """Evaluates networks with any metric; see :func:`~dfkd_fast.evaluation.evaluate` for the other arguments and the errors.

    Args:
        batches: iterable of images (B, C, H, W) and labels (B,) or (B, H, W).
        metric: function from a device to an empty accumulator.
        classes: required number of classes of every network; None for any number.
    """
    device = torch.device(device)
    metrics = {name: metric(device) for name in networks}
    # Per network: number of outputs that are not finite, number of invalid labels, number of equal predictions, sum of KL.
    sums = {name: torch.zeros(4, dtype=torch.float64, device=device) for name in networks}
    start, decode_seconds = time.perf_counter(), 0.0
    image_count = label_count = 0
    with ExitStack() as modes:
        for network in networks.values():
            modes.enter_context(eval_mode(network))
        for seconds, (images, labels) in _timed(batches):
            decode_seconds += seconds
            images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
            labels = labels.to(device, non_blocking=True)
            with autocast():
                outputs = {name: network(images) for name, network in networks.items()}
            logits = {name: _logits_for(name, output, labels, classes) for name, output in outputs.items()}
            for name, own_logits in logits.items():
                invalid = (labels >= own_logits.shape[1]) | (labels < 0) & (labels != IGNORE_INDEX)
                agreement, divergence = _agreement(own_logits, logits.get(reference or name, own_logits))
                counts = (~own_logits.isfinite()).any(dim=1).sum(), invalid.sum(), agreement, divergence
                sums[name] += torch.stack([number.double() for number in counts])
                # On a GPU, an invalid label would trigger a device-side assertion; they are counted instead.
                metrics[name].update(own_logits, labels.masked_fill(invalid, 0))
            image_count += len(labels)
            label_count += labels.numel()
            on_batch(len(labels))
    for name in sums:
        sums[name], metrics[name].sums = (distributed.all_reduce_sum(each).cpu() for each in (sums[name], metrics[name].sums))
    total_seconds = time.perf_counter() - start
    image_count, label_count = distributed.all_reduce_sum(torch.tensor([image_count, label_count], device=device)).tolist()
    unreadable = sorted(distributed.all_gather(list(getattr(batches, "unreadable", []))))
    if image_count == 0:
        reason = f": none of {len(unreadable)} can be decoded, {unreadable[0]}" if unreadable else ""
        raise DfkdError(f"no images to evaluate on{reason}")
    for name, network_sums in sums.items():
        _check_sums(name, network_sums, label_count, "images" if label_count == image_count else "pixels")
    return Evaluation(
        networks={name: metrics[name].compute(label_count) for name in networks},
        agreements=[
            Agreement(name, reference, 100 * network_sums[2].item() / label_count, network_sums[3].item() / label_count)
            for name, network_sums in sums.items()
            if reference is not None and name != reference
        ],
        count=image_count,
        unreadable=unreadable,
        seconds={"total": total_seconds, "decode": decode_seconds, "network": total_seconds - decode_seconds},
    )


def _check_sums(name: str, sums: Tensor, label_count: int, unit: str) -> None:
    """Raises a :class:`DfkdError` if a network had non-finite outputs or invalid labels."""
    nonfinite, invalid_labels = sums[:2].long().tolist()
    if nonfinite:
        raise DfkdError(f"network {name}: its output is NaN or infinite on {nonfinite} of {label_count} {unit}")
    if invalid_labels:
        raise DfkdError(f"network {name}: {invalid_labels} of {label_count} labels are not among its classes")


def _timed(elements: Iterable[Element]) -> Iterator[tuple[float, Element]]:
    """Yields the elements of an iterable, each with the seconds it took to get it."""
    iterator = iter(elements)
    for _ in itertools.count():
        start = time.perf_counter()
        try:
            element = next(iterator)
        except StopIteration:
            return
        yield time.perf_counter() - start, element


def _logits_for(name: str, output: Any, labels: Tensor, classes: int | None) -> Tensor:
    """Returns the logits of a network's output as float32, interpolated to the size of the labels."""
    try:
        logits = get_logits(output).float()
    except DfkdError as error:
        raise DfkdError(f"network {name} {error}") from error
    if logits.ndim != labels.ndim + 1 or logits.shape[1] != (classes or logits.shape[1]):
        shape = ", ".join(["B", str(classes or "classes"), *("H", "W")[: 2 * (labels.ndim > 1)]])
        raise DfkdError(f"network {name} must return logits ({shape}), not {tuple(logits.shape)}")
    if logits.shape[2:] == labels.shape[1:]:
        return logits
    return F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)


def _agreement(logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the number of images or pixels with equal predictions, and the sum of KL(reference ‖ network)."""
    if logits is reference:
        return logits.new_zeros(()), logits.new_zeros(())
    divergence, agreement = kl_discrepancy(
        logits, reference, temperature=1.0, reduction="sum", scale_by_temperature_squared=False, agreement=True
    )
    return agreement, divergence
