"""Exponential moving average of a list of tensors, in place."""

from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from .. import operators
from ..dispatch import Backend, BackendError, choose, forced
from . import reference
from .sharing import without_repeats

__all__ = ["ema_multi_avg_fn", "ema_update_"]

AVERAGED = {torch.float32, torch.float64, torch.complex64, torch.complex128}
_dtype = attrgetter("dtype")


def ema_update_(
    averages: Sequence[Tensor], sources: Sequence[Tensor], decay: float | Tensor, *, shadows: Sequence[Tensor] | None = None
) -> None:
    """``averages ← decay · averages + (1 − decay) · sources``, in place (MAD, arXiv 2209.10359).

    Computed as ``average + (1 − decay)(source − average)``, so that equal tensors stay equal. Integer
    tensors are copied, having no average. A pair that is listed several times, such as a tied weight, is averaged once.

    Args:
        averages: tensors of any shapes, on one device; floating ones in float32 (float64 and complex numbers of two float32 or
            float64 with the reference backend), because half precision would drop the increment ``(1 − decay)(source − average)``.
            No two share memory.
        sources: as many tensors, each of the shape and strides of its average; float32, float64,
            bfloat16 or float16, or complex as their average. They may share memory with one another, but not with another pair's
            average or shadow.
        decay: in [0, 1]; a float, or a 0-d float32 or float64 tensor on the tensors' device so that a captured CUDA graph
            can see it change: on a GPU its value is not checked.
        shadows: as many tensors, of the shapes and strides of the averages, that receive the new averages in
            their own dtype in the same pass: a half-precision copy to compute with.

    Raises:
        ValueError: the lists differ in length, or tensors of one place differ in shape, strides, device or kind of
            dtype, or share memory with those of another; the message names the index. Or decay is no number in [0, 1].
        BackendError: a forced backend does not serve the tensors' device, dtypes or strides.
    """
    pairs(averages, sources, shadows).update_(decay)


class Pairs(NamedTuple):
    """Lists of tensors that fit each other, and the backend that serves them."""

    averages: Sequence[Tensor]
    sources: Sequence[Tensor]
    shadows: Sequence[Tensor] | None
    backend: Backend
    versioned: Sequence[Tensor]
    """Those that change and that autograd watches."""

    def update_(self, decay: float | Tensor) -> None:
        """As ``ema_update_``, without looking at the lists again."""
        _check_decay(decay, self.averages)
        with torch.no_grad():
            if self.backend == "reference":
                reference.ema_update_(self.averages, self.sources, decay, self.shadows)
                return
            number, tensor = (0.0, decay) if isinstance(decay, Tensor) else (decay, None)
            update = operators.operator("ema_update_", self.backend, self.averages[0])
            update(self.averages, self.sources, self.shadows or [], number, tensor)
        # What a graph has saved must not change behind its back.
        torch.autograd.graph.increment_version(self.versioned)


def pairs(averages: Sequence[Tensor], sources: Sequence[Tensor], shadows: Sequence[Tensor] | None) -> Pairs:
    """Check the lists of ``ema_update_`` and choose its backend.

    Raises:
        ValueError, BackendError: as ``ema_update_``.
    """
    _check(averages, sources, shadows)
    averages, sources, shadows = without_repeats((averages, sources, shadows))
    backend: Backend = "reference"
    if averages:
        dtypes = {dtype for dtype in map(_dtype, chain(averages, sources, shadows or ())) if dtype.is_floating_point or dtype.is_complex}
        backend = choose("ema_update_", averages[0].device, dtypes, sum(map(Tensor.numel, averages)))
    if backend != "reference":
        gaps = not all(map(Tensor.is_contiguous, averages)) and not all(map(_dense, averages))
        if gaps or any(map(Tensor.is_neg, chain(averages, sources, shadows or ()))):
            if forced():
                what = "tensors without gaps" if gaps else "tensors whose negative bit is not set: call resolve_neg()"
                raise BackendError(f"the backend {backend} is forced, but averages only {what}")
            backend = "reference"
    return Pairs(averages, sources, shadows, backend, [changed for changed in (*averages, *(shadows or ())) if not changed.is_inference()])


def ema_multi_avg_fn(decay: float | Tensor) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """A drop-in for ``torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=ema_multi_avg_fn(0.999))``.

    Args:
        decay: as of ``ema_update_``.
    """

    def update(averages: Sequence[Tensor], sources: Sequence[Tensor], _: Tensor | int) -> None:
        ema_update_(averages, sources, decay)

    return update


def _check_decay(decay: float | Tensor, averages: Sequence[Tensor]) -> None:
    if isinstance(decay, Tensor):
        if decay.ndim != 0 or decay.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"decay must be a float or a 0-d float32 or float64 tensor, not a {tuple(decay.shape)} one of {decay.dtype}")
        if averages and decay.device != averages[0].device:
            raise ValueError(f"decay is on {decay.device}, the averages on {averages[0].device}")
        if decay.device.type != "cpu" or type(decay) is not Tensor or torch.compiler.is_compiling():  # to read it would wait for it
            return
        decay = decay.item()
    if not isinstance(decay, int | float):
        raise ValueError(f"decay must be a float or a 0-d float32 or float64 tensor, not {decay!r}")
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay must be in [0, 1], not {decay}")


def _check(averages: Sequence[Tensor], sources: Sequence[Tensor], shadows: Sequence[Tensor] | None) -> None:
    if len(averages) != len(sources):
        raise ValueError(f"averages and sources differ in length: {len(averages)} and {len(sources)}")
    if shadows is not None and len(shadows) != len(averages):
        raise ValueError(f"averages and shadows differ in length: {len(averages)} and {len(shadows)}")
    for index, average in enumerate(averages):
        if average.dtype not in AVERAGED and (average.is_floating_point() or average.is_complex()):
            raise ValueError(f"pair {index}: an average must be float32 or float64, not {average.dtype}")
        if average.device != averages[0].device:
            raise ValueError(f"pair {index}: averages differ in device: {average.device}, and the first is on {averages[0].device}")
        _check_pair(index, "source", average, sources[index])
        if shadows is not None:
            _check_pair(index, "shadow", average, shadows[index])


def _check_pair(index: int, name: str, average: Tensor, other: Tensor) -> None:
    if average.shape != other.shape:
        difference = f"shape: {tuple(average.shape)} and {tuple(other.shape)}"
    elif average.stride() != other.stride() and _strides(average) != _strides(other):
        difference = f"strides: {average.stride()} and {other.stride()}"
    elif average.device != other.device:
        difference = f"device: {average.device} and {other.device}"
    elif average.dtype != other.dtype and not (
        (average.is_floating_point() and other.is_floating_point()) or (average.is_complex() and other.is_complex())
    ):
        difference = f"dtype: {average.dtype} and {other.dtype}"
    else:
        return
    raise ValueError(f"pair {index}: average and {name} differ in {difference}")


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of the dimensions that have more than one element: the others move nothing."""
    return tuple(stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill their stretch of memory, each once, so that a kernel may take them in storage order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _fake_ema_update_(
    averages: list[Tensor], sources: list[Tensor], shadows: list[Tensor], decay: float, device_decay: Tensor | None
) -> None:
    return None


operators.define(
    __name__,
    "ema_update_",
    "(Tensor(a!)[] averages, Tensor[] sources, Tensor(b!)[] shadows, float decay, Tensor? device_decay) -> ()",
    _fake_ema_update_,
)
