"""Exponential moving average in Triton: up to 32 contiguous segments per launch; tensors in one arena are one segment."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import launch, store, unspecialized

BLOCK = 2048  # elements per program: at least two 16-byte loads in flight per thread
MAX_SEGMENTS = 32  # segments per launch; addresses are passed as kernel arguments, so that a CUDA graph can capture them
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class _Segment(NamedTuple):
    """Contiguous elements of an average, with their source and shadow, by address."""

    average: int
    source: int
    shadow: int
    numel: int
    source_dtype: torch.dtype
    shadow_dtype: torch.dtype | None

    def merged(self, after: "_Segment") -> "_Segment | None":
        """Return both segments as one if they are contiguous in every list, else None."""
        contiguous = (
            self[4:] == after[4:]
            and after.average == self.average + 4 * self.numel
            and after.source == self.source + self.source_dtype.itemsize * self.numel
            and (self.shadow_dtype is None or after.shadow == self.shadow + self.shadow_dtype.itemsize * self.numel)
        )
        return self._replace(numel=self.numel + after.numel) if contiguous else None


def ema_update_(
    averages: Sequence[Tensor], sources: Sequence[Tensor], shadows: Sequence[Tensor], decay: float, device_decay: Tensor | None
) -> None:
    """See kernels/ema; integer tensors are copied by PyTorch."""
    integers = [index for index, average in enumerate(averages) if not average.is_floating_point()]
    for copies in (averages, shadows):
        if integers and copies:
            torch._foreach_copy_([copies[index] for index in integers], [sources[index] for index in integers])
    by_dtypes: dict[tuple[torch.dtype, torch.dtype | None], list[_Segment]] = {}
    for segment in _segments(averages, sources, shadows or [None] * len(averages)):
        by_dtypes.setdefault((segment.source_dtype, segment.shadow_dtype), []).append(segment)
    for (source_dtype, shadow_dtype), segments in by_dtypes.items():
        for start in range(0, len(segments), MAX_SEGMENTS):
            batch = segments[start : start + MAX_SEGMENTS]
            grid = (sum(triton.cdiv(segment.numel, BLOCK) for segment in batch),)
            if len(batch) > 1:  # the kernel is compiled for 1 and for MAX_SEGMENTS segments; unused ones are empty
                batch += [batch[-1]._replace(numel=0)] * (MAX_SEGMENTS - len(batch))
            launch(
                averages[0],
                _update_kernel,
                grid,
                unspecialized([segment.average for segment in batch]),
                unspecialized([segment.numel for segment in batch]),
                unspecialized([segment.source for segment in batch]),
                unspecialized([segment.shadow for segment in batch]) if shadow_dtype else None,
                1.0 - decay,
                device_decay,
                DTYPES[source_dtype],
                DTYPES[shadow_dtype] if shadow_dtype else None,
                BLOCK,
            )


def _segments(averages: Sequence[Tensor], sources: Sequence[Tensor], shadows: Sequence[Tensor | None]) -> list[_Segment]:
    segments: list[_Segment] = []
    for average, source, shadow in zip(averages, sources, shadows, strict=True):
        if not average.is_floating_point() or not average.numel():
            continue
        address, dtype = (0, None) if shadow is None else (shadow.data_ptr(), shadow.dtype)
        segment = _Segment(average.data_ptr(), source.data_ptr(), address, average.numel(), source.dtype, dtype)
        merged = segments[-1].merged(segment) if segments else None
        if merged:
            segments[-1] = merged
        else:
            segments.append(segment)
    return segments


@triton.jit
def _update_kernel(
    averages: tl.tuple,  # unspecialized, like numels, sources and shadows
    numels: tl.tuple,
    sources: tl.tuple,
    shadows: tl.tuple,
    weight: tl.tensor,
    device_decay: tl.tensor,
    source_dtype: tl.constexpr,
    shadow_dtype: tl.constexpr,
    block: tl.constexpr,
) -> None:
    weight = tl.cast(weight, tl.float32) if device_decay is None else (1 - tl.load(device_decay)).to(tl.float32)
    # Find the segment of this program: the segments occupy consecutive ranges of the grid.
    program = tl.program_id(0)
    average = averages[0]
    numel = numels[0]
    source = sources[0]
    shadow = shadows[0] if shadows is not None else None
    first = tl.full((), 0, tl.int64)
    begin = first
    for i in tl.static_range(1, len(averages)):
        begin += tl.cdiv(numels[i - 1] // -2, block)
        selected = program >= begin
        average = tl.where(selected, averages[i], average)
        numel = tl.where(selected, numels[i], numel)
        source = tl.where(selected, sources[i], source)
        if shadows is not None:
            shadow = tl.where(selected, shadows[i], shadow)
        first = tl.where(selected, begin, first)
    average = average // -2
    source = source // -2
    addresses = average | source
    if shadow is not None:
        shadow = shadow // -2
        addresses |= shadow
    numel = numel // -2
    start = (program - first) * block
    if (start + block <= numel) & (addresses % 16 == 0):  # unmasked and aligned, for 16-byte accesses
        _update(average, source, shadow, source_dtype, shadow_dtype, start, None, weight, block)
    else:
        _update(average, source, shadow, source_dtype, shadow_dtype, start, numel, weight, block)


@triton.jit
def _pointers(address: tl.tensor, dtype: tl.constexpr, elements: tl.tensor, aligned: tl.constexpr) -> tl.tensor:
    pointer = address.to(tl.pointer_type(dtype))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + elements


@triton.jit
def _update(
    average: tl.tensor,
    source: tl.tensor,
    shadow: tl.tensor,
    source_dtype: tl.constexpr,
    shadow_dtype: tl.constexpr,
    start: tl.tensor,
    numel: tl.tensor,
    weight: tl.tensor,
    block: tl.constexpr,
) -> None:
    """Update one block of a segment, given by addresses; a full, aligned block if ``numel`` is None."""
    elements = start + tl.arange(0, block)
    mask = None if numel is None else elements < numel
    averages = _pointers(average, tl.float32, elements, numel is None)
    old = tl.load(averages, mask=mask)
    new = tl.load(_pointers(source, source_dtype, elements, numel is None), mask=mask).to(tl.float32)
    step = new - old
    # The formula of torch.lerp, exact for weights 0 and 1.
    updated = tl.where(weight < 0.5, old + weight * step, new - (1 - weight) * step)
    tl.store(averages, updated, mask=mask)
    if shadow is not None:
        store(_pointers(shadow, shadow_dtype, elements, numel is None), updated, mask)
