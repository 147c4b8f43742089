"""Multi-tensor exponential moving average, in place."""

from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from .. import operators
from ..checks import require_tensor_lists, shown
from ..dispatch import Backend, BackendError, choose, forced
from . import reference
from .sharing import deduplicate

__all__ = ["ema_multi_avg_fn", "ema_update_"]

AVERAGED = {torch.float32, torch.float64, torch.complex64, torch.complex128}
_get_dtype = attrgetter("dtype")


def ema_update_(
    averages: Sequence[Tensor], sources: Sequence[Tensor], decay: float | Tensor, *, shadows: Sequence[Tensor] | None = None
) -> None:
    """Update exponential moving averages in place: ``averages ← decay · averages + (1 − decay) · sources``.

    Computed as ``average + (1 − decay)(source − average)``, so that equal tensors stay exactly equal. Integer tensors are copied.
    A pair that occurs several times, such as a tied weight, is updated once. Momentum teachers of this form are used by MAD
    (arXiv 2209.10359).

    Args:
        averages: tensors of any shapes on one device, which must not overlap. Floating-point averages must be float32 (float64 and
            complex dtypes with the reference backend); half precision would round off the increment.
        sources: one tensor per average, of the same shape and strides; float32, float64, bfloat16, float16, or complex like the
            average. Sources may overlap each other, but not the average or shadow of another pair.
        decay: decay rate in [0, 1]; a float, or a 0-d float32 or float64 tensor on the same device, which a captured CUDA graph
            reads at every replay. The value of a tensor on a GPU is not checked.
        shadows: optional copies, one tensor per average of the same shape and strides and of any floating-point dtype; the new
            averages are written to them in the same pass.

    Raises:
        ValueError: the lists differ in length; the tensors of a pair differ in shape, strides, device or kind of dtype, or
            overlap those of another pair (the message contains the index); or ``decay`` is not a number in [0, 1].
        TypeError: the lists are not lists or tuples of tensors.
        BackendError: a forced backend does not support the device, dtypes or strides.

    Examples:
        >>> import torch
        >>> from dfkd_fast.kernels import ema_update_
        >>> average, source = torch.zeros(2), torch.ones(2)
        >>> ema_update_([average], [source], 0.9)
        >>> average
        tensor([0.1000, 0.1000])
    """
    pairs(averages, sources, shadows).update_(decay)


class Pairs(NamedTuple):
    """Validated lists of tensors and the backend that updates them."""

    averages: Sequence[Tensor]
    sources: Sequence[Tensor]
    shadows: Sequence[Tensor] | None
    backend: Backend
    versioned: Sequence[Tensor]
    """Tensors that are written and have a version counter."""

    def update_(self, decay: float | Tensor) -> None:
        """Update the averages as ``ema_update_``, without validating the lists again."""
        _check_decay(decay, self.averages)
        with torch.no_grad():
            if self.backend == "reference":
                reference.ema_update_(self.averages, self.sources, decay, self.shadows)
                return
            number, tensor = (0.0, decay) if isinstance(decay, Tensor) else (decay, None)
            update = operators.operator("ema_update_", self.backend, self.averages[0])
            update(self.averages, self.sources, self.shadows or [], number, tensor)
        # Lets autograd detect that a tensor it has saved was modified.
        torch.autograd.graph.increment_version(self.versioned)


def pairs(averages: Sequence[Tensor], sources: Sequence[Tensor], shadows: Sequence[Tensor] | None) -> Pairs:
    """Validate the lists of ``ema_update_`` and choose the backend.

    Returns:
        The lists without repeated pairs, ready to be updated.

    Raises:
        ValueError, BackendError: as ``ema_update_``.
    """
    _check(averages, sources, shadows)
    averages, sources, shadows = deduplicate((averages, sources, shadows))
    backend: Backend = "reference"
    if averages:
        dtypes = {
            dtype for dtype in map(_get_dtype, chain(averages, sources, shadows or ())) if dtype.is_floating_point or dtype.is_complex
        }
        backend = choose("ema_update_", averages[0].device, dtypes, sum(map(Tensor.numel, averages)))
    if backend != "reference":
        gaps = not all(map(Tensor.is_contiguous, averages)) and not all(map(_dense, averages))
        if gaps or any(map(Tensor.is_neg, chain(averages, sources, shadows or ()))):
            if forced():
                what = "dense tensors" if gaps else "tensors whose negative bit is not set: call resolve_neg()"
                raise BackendError(f"the backend {backend} is forced, but supports only {what}")
            backend = "reference"
    return Pairs(averages, sources, shadows, backend, [changed for changed in (*averages, *(shadows or ())) if not changed.is_inference()])


def ema_multi_avg_fn(decay: float | Tensor) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """Return an averaging function for ``torch.optim.swa_utils.AveragedModel``; replaces ``get_ema_multi_avg_fn``.

    Args:
        decay: decay rate in [0, 1], as in ``ema_update_``.

    Returns:
        A function to be passed as ``multi_avg_fn``.

    Raises:
        ValueError: ``decay`` is not a number in [0, 1].

    Examples:
        >>> import torch
        >>> from dfkd_fast.kernels import ema_multi_avg_fn
        >>> model = torch.nn.Linear(3, 2)
        >>> averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=ema_multi_avg_fn(0.999))
        >>> averaged.update_parameters(model)
    """
    _check_decay(decay, ())

    def update(averages: Sequence[Tensor], sources: Sequence[Tensor], _: Tensor | int) -> None:
        ema_update_(averages, sources, decay)

    return update


def _check_decay(decay: float | Tensor, averages: Sequence[Tensor]) -> None:
    if isinstance(decay, Tensor):
        if decay.ndim != 0 or decay.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"decay must be a float or a 0-d float32 or float64 tensor, not a {tuple(decay.shape)} one of {decay.dtype}")
        if averages and decay.device != averages[0].device:
            raise ValueError(f"decay is on {decay.device}, the averages on {averages[0].device}")
        if decay.device.type != "cpu" or type(decay) is not Tensor or torch.compiler.is_compiling():  # no synchronization
            return
        decay = decay.item()
    if not isinstance(decay, int | float):
        raise ValueError(f"decay must be a float or a 0-d float32 or float64 tensor, not {shown(decay)}")
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay must be in [0, 1], not {decay}")


def _check(averages: Sequence[Tensor], sources: Sequence[Tensor], shadows: Sequence[Tensor] | None) -> None:
    require_tensor_lists(averages=averages, sources=sources, shadows=() if shadows is None else shadows)
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
    """Return the strides of the dimensions of size > 1; the others are irrelevant."""
    return tuple(stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)


def _dense(tensor: Tensor) -> bool:
    """Return whether a tensor is dense and non-overlapping, so that a kernel can process it in memory order."""
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
