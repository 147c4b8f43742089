"""One pass of networks over labelled images: what each is worth is added up, and how far they agree."""

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
NO_TIME = 1e-9  # seconds


@dataclass(frozen=True)
class Agreement:
    """How far a network follows another one."""

    network: str
    reference: str
    top1: float
    """Images, or pixels, on which both predict the same class, in percent."""
    mean_kl: float
    """Of KL(reference ‖ network) over the images, or pixels, in nats."""


@dataclass(frozen=True)
class Evaluation(Generic[Metrics]):
    """One pass of networks over labelled images, of all processes together."""

    networks: dict[str, Metrics]
    """The metrics of each."""
    agreements: list[Agreement]
    """Of every network with the reference."""
    count: int
    """Images that were seen."""
    unreadable: list[str]
    """Files that could not be decoded, and why."""
    seconds: dict[str, float]
    """``total``, of which ``decode`` was spent waiting for images, and ``network`` on everything else; here."""

    @property
    def images_per_second(self) -> float:
        """Of the whole pass."""
        return self.count / max(self.seconds["total"], NO_TIME)


class Metric(Protocol[Metrics]):
    """What is added up over a pass, of one network."""

    sums: Tensor
    """float64, on the device; added up over the processes before :meth:`compute`."""

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Take a batch in.

        Args:
            logits: float32 (B, classes, …), of the labels' size.
            labels: IGNORE_INDEX or a class.
        """

    def compute(self, count: int) -> Metrics:
        """What the network is worth on so many images or pixels."""


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
    """What :func:`~dfkd_fast.evaluation.evaluate` does, whatever is measured; so are the other arguments and the errors.

    Args:
        batches: (images (B, C, H, W), labels (B,) or (B, H, W)).
        metric: makes an empty one, on a device.
        classes: how many every network must have; any number if None.
    """
    device = torch.device(device)
    metrics = {name: metric(device) for name in networks}
    # Of each network: outputs that are NaN or infinite, labels that are none of its classes, agreement, divergence.
    sums = {name: torch.zeros(4, dtype=torch.float64, device=device) for name in networks}
    clock, waiting = time.perf_counter(), 0.0
    count = total = 0  # images, and labels
    with ExitStack() as modes:
        for network in networks.values():
            modes.enter_context(eval_mode(network))
        for waited, (images, labels) in _timed(batches):
            waiting += waited
            seen = images.to(device, non_blocking=True, memory_format=torch.channels_last)
            labels = labels.to(device, non_blocking=True)
            with autocast():
                outputs = {name: network(seen) for name, network in networks.items()}
            logits = {name: _fitted(name, output, labels, classes) for name, output in outputs.items()}
            for name, own in logits.items():
                invalid = (labels >= own.shape[1]) | (labels < 0) & (labels != IGNORE_INDEX)
                agreement, divergence = _agreeing(own, logits.get(reference or name, own))
                counts = (~own.isfinite()).any(dim=1).sum(), invalid.sum(), agreement, divergence
                sums[name] += torch.stack([number.double() for number in counts])
                # Invalid labels are counted, and would end a GPU's process here.
                metrics[name].update(own, labels.masked_fill(invalid, 0))
            count += len(labels)
            total += labels.numel()
            on_batch(len(labels))
    for name, own in sums.items():
        sums[name], metrics[name].sums = (distributed.all_reduce_sum(each).cpu() for each in (own, metrics[name].sums))
    seconds = time.perf_counter() - clock
    count, total = distributed.all_reduce_sum(torch.tensor([count, total], device=device)).tolist()
    unreadable = sorted(distributed.all_gather(list(getattr(batches, "unreadable", []))))
    if count == 0:
        raise DfkdError("no images to evaluate on" + (f": none of {len(unreadable)} can be decoded, {unreadable[0]}" if unreadable else ""))
    for name, own in sums.items():
        _check_sums(name, own, total, "images" if total == count else "pixels")
    return Evaluation(
        networks={name: metrics[name].compute(total) for name in networks},
        agreements=[
            Agreement(name, reference, 100 * own[2].item() / total, own[3].item() / total)
            for name, own in sums.items()
            if reference is not None and name != reference
        ],
        count=count,
        unreadable=unreadable,
        seconds={"total": seconds, "decode": waiting, "network": seconds - waiting},
    )


def _check_sums(name: str, sums: Tensor, total: int, what: str) -> None:
    nonfinite, invalid_labels = sums[:2].long().tolist()
    if nonfinite:
        raise DfkdError(f"network {name}: its output is NaN or infinite on {nonfinite} of {total} {what}")
    if invalid_labels:
        raise DfkdError(f"network {name}: {invalid_labels} of {total} labels are none of its classes")


def _timed(elements: Iterable[Element]) -> Iterator[tuple[float, Element]]:
    """The elements, and for how many seconds each was waited for."""
    iterator = iter(elements)
    for _ in itertools.count():
        begin = time.perf_counter()
        try:
            element = next(iterator)
        except StopIteration:
            return
        yield time.perf_counter() - begin, element


def _fitted(name: str, output: Any, labels: Tensor, classes: int | None) -> Tensor:
    """The logits in an output, float32 and of the labels' size."""
    try:
        logits = get_logits(output).float()
    except DfkdError as error:
        raise DfkdError(f"network {name} {error}") from error
    if logits.ndim != labels.ndim + 1 or logits.shape[1] != (classes or logits.shape[1]):
        wanted = ", ".join(["B", str(classes or "classes"), *("H", "W")[: 2 * (labels.ndim > 1)]])
        raise DfkdError(f"network {name} must return logits ({wanted}), not {tuple(logits.shape)}")
    if logits.shape[2:] == labels.shape[1:]:
        return logits
    return F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)


def _agreeing(logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """On how many images or pixels the largest logits are the same, and the sum of KL(reference ‖ network)."""
    if logits is reference:
        return logits.new_zeros(()), logits.new_zeros(())
    divergence, agreement = kl_discrepancy(
        logits, reference, temperature=1.0, reduction="sum", scale_by_temperature_squared=False, agreement=True
    )
    return agreement, divergence
