"""What networks are worth on labelled images, and how far they agree."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_stat_scores

from dfkd_fast import distributed
from dfkd_fast.errors import DfkdError
from dfkd_fast.kernels import kl_discrepancy
from dfkd_fast.models import evaluating

__all__ = ["Agreement", "Evaluation", "Figures", "evaluate", "top1_accuracy"]

Element = TypeVar("Element")
NO_TIME = 1e-9  # seconds


@dataclass(frozen=True)
class Figures:
    """One network's accuracy, in percent."""

    top1: float
    top5: float
    """The label is among the five largest logits; among all, where there are fewer."""


@dataclass(frozen=True)
class Agreement:
    """How far a network follows another one."""

    network: str
    reference: str
    top1: float
    """Images on which both predict the same class, in percent."""
    mean_kl: float
    """Of KL(reference ‖ network) over the images, in nats."""


@dataclass(frozen=True)
class Evaluation:
    """One pass of networks over labelled images, of all processes together."""

    networks: dict[str, Figures]
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


def evaluate(
    networks: Mapping[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str = "cpu",
    *,
    reference: str | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    on_batch: Callable[[int], None] = lambda images: None,
) -> Evaluation:
    """Show every image once to all networks, in evaluation mode; every module is left in the mode it was in.

    Under torchrun each process brings its share of the images, and all get the figures of the whole.

    Args:
        networks: images (B, C, H, W) → logits (B, classes), by name.
        batches: (images, labels (B,)).
        device: where the networks are.
        reference: the network that the others are set against; none by default.
        autocast: makes the context for a forward pass.
        on_batch: told how many images a batch had.

    Raises:
        DfkdError: there are no images at all, in any process, a network's output is no number, or a label none of its classes.
    """
    device = torch.device(device)
    # Of each network: right, right among five, outputs that are no numbers, labels beyond its classes, agreement and divergence.
    sums = {name: torch.zeros(6, dtype=torch.float64, device=device) for name in networks}
    clock, count, waiting = time.perf_counter(), 0, 0.0
    with ExitStack() as modes:
        for network in networks.values():
            modes.enter_context(evaluating(network))
        for seconds, (images, labels) in _timed(batches):
            waiting += seconds
            seen = images.to(device, non_blocking=True, memory_format=torch.channels_last)
            labels = labels.to(device, non_blocking=True)
            with autocast():
                logits = {name: network(seen) for name, network in networks.items()}
            for name, found in logits.items():
                sums[name] += torch.stack([*_right(found.float(), labels), *_agreeing(found, logits.get(reference or name, found))])
            count += len(labels)
            on_batch(len(labels))
    totals = {name: distributed.summed(found).tolist() for name, found in sums.items()}
    total = time.perf_counter() - clock
    count = int(distributed.summed(torch.tensor(count, device=device)))
    unreadable = sorted(distributed.gathered(list(getattr(batches, "unreadable", []))))
    if count == 0:
        raise DfkdError("no images to evaluate on" + (f": none of {len(unreadable)} can be decoded, {unreadable[0]}" if unreadable else ""))
    for name, found in totals.items():
        if found[2]:
            raise DfkdError(f"network {name}: its output is NaN or infinite on {int(found[2])} of {count} images")
        if found[3]:
            raise DfkdError(f"network {name}: {int(found[3])} of {count} labels are none of its classes")
    return Evaluation(
        networks={name: Figures(100 * found[0] / count, 100 * found[1] / count) for name, found in totals.items()},
        agreements=[
            Agreement(name, reference, 100 * found[4] / count, found[5] / count)
            for name, found in totals.items()
            if reference is not None and name != reference
        ],
        count=count,
        unreadable=unreadable,
        seconds={"total": total, "decode": waiting, "network": total - waiting},
    )


def top1_accuracy(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | str = "cpu") -> float:
    """Percentage of images whose largest logit is their label's; see :func:`evaluate`."""
    return evaluate({"network": network}, batches, device).networks["network"].top1


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


def _right(logits: Tensor, labels: Tensor) -> Iterator[Tensor]:
    """Right ones, right ones among five, outputs that are no numbers, and labels that are no classes."""
    classes = logits.shape[1]
    known = labels.clamp(max=classes - 1)  # others are counted, and would end a GPU's process here
    for among in (1, min(5, classes)):
        yield multiclass_stat_scores(logits, known, classes, top_k=among, average="micro", validate_args=False)[0]
    yield (~logits.isfinite()).any(dim=1).sum()
    yield (labels >= classes).sum()


def _agreeing(logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """On how many images the largest logits are the same, and the sum of KL(reference ‖ network)."""
    if logits is reference:
        return logits.new_zeros((), dtype=torch.float64), logits.new_zeros((), dtype=torch.float64)
    divergence, agreement = kl_discrepancy(
        logits, reference, temperature=1.0, reduction="sum", scale_by_temperature_squared=False, agreement=True
    )
    return agreement, divergence
