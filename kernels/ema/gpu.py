"""The moving average in Triton: up to 32 pairs of tensors a launch, one launch for arenas that hold them all."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import launch, store

BLOCK = 2048  # elements a program: two or more 16-byte loads a thread are under way at once
MOST = 32  # segments a launch: their addresses travel among the kernel's arguments, so that a graph can capture them
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class _Segment(NamedTuple):
    """Neighbouring elements of an average, their source and their shadow, by address."""

    average: int
    source: int
    shadow: int
    numel: int
    source_dtype: torch.dtype
    shadow_dtype: torch.dtype | None

    @property
    def kind(self) -> tuple[torch.dtype, torch.dtype | None, bool]:
        """Segments of one kind are updated by one kernel."""
        return self.source_dtype, self.shadow_dtype, (self.average | self.source | self.shadow) % 16 == 0

    def joined(self, after: "_Segment") -> "_Segment | None":
        """This segment and that one as one, if memory goes on from one to the other in every list."""
        goes_on = (
            self[4:] == after[4:]
            and after.average == self.average + 4 * self.numel
            and after.source == self.source + self.source_dtype.itemsize * self.numel
            and (self.shadow_dtype is None or after.shadow == self.shadow + self.shadow_dtype.itemsize * self.numel)
        )
        return self._replace(numel=self.numel + after.numel) if goes_on else None


def ema_update_(
    averages: Sequence[Tensor], sources: Sequence[Tensor], shadows: Sequence[Tensor], decay: float, device_decay: Tensor | None
) -> None:
    """See kernels/ema; integer tensors are copied by PyTorch, in a launch of their own."""
    integers = [index for index, average in enumerate(averages) if not average.is_floating_point()]
    for copies in (averages, shadows):
        if integers and copies:
            torch._foreach_copy_([copies[index] for index in integers], [sources[index] for index in integers])
    kinds: dict[tuple[torch.dtype, torch.dtype | None, bool], list[_Segment]] = {}
    for segment in _segments(averages, sources, shadows or [None] * len(averages)):
        kinds.setdefault(segment.kind, []).append(segment)
    for (source_dtype, shadow_dtype, aligned), segments in kinds.items():
        for start in range(0, len(segments), MOST):
            part = segments[start : start + MOST]
            launch(
                averages[0],
                _update_kernel,
                (sum(triton.cdiv(segment.numel, BLOCK) for segment in part),),
                tuple(segment.average for segment in part),
                tuple(segment.average + 4 * segment.numel - 1 for segment in part),
                tuple(segment.source for segment in part),
                tuple(segment.shadow for segment in part) if shadow_dtype else None,
                1.0 - decay,
                device_decay,
                DTYPES[source_dtype],
                DTYPES[shadow_dtype] if shadow_dtype else None,
                aligned,
                BLOCK,
            )


def _segments(averages: Sequence[Tensor], sources: Sequence[Tensor], shadows: Sequence[Tensor | None]) -> list[_Segment]:
    segments: list[_Segment] = []
    for average, source, shadow in zip(averages, sources, shadows, strict=True):
        if not average.is_floating_point() or not average.numel():
            continue
        address, dtype = (0, None) if shadow is None else (shadow.data_ptr(), shadow.dtype)
        segment = _Segment(average.data_ptr(), source.data_ptr(), address, average.numel(), source.dtype, dtype)
        joined = segments[-1].joined(segment) if segments else None
        if joined:
            segments[-1] = joined
        else:
            segments.append(segment)
    return segments


@triton.jit
def _update_kernel(
    averages: tl.tuple,
    lasts: tl.tuple,  # addresses of the averages' last bytes: odd, as Triton would compile anew for each pattern of multiples of 16
    sources: tl.tuple,
    shadows: tl.tuple,
    weight: tl.tensor,
    device_decay: tl.tensor,
    source_dtype: tl.constexpr,
    shadow_dtype: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
) -> None:
    weight = tl.cast(weight, tl.float32) if device_decay is None else (1 - tl.load(device_decay)).to(tl.float32)
    # The segments' blocks lie one after another on the grid.
    program = tl.program_id(0)
    average = averages[0]
    last = lasts[0]
    source = sources[0]
    shadow = shadows[0] if shadows is not None else None
    first = tl.full((), 0, tl.int64)
    begin = first
    for i in tl.static_range(1, len(averages)):
        begin += tl.cdiv((lasts[i - 1] - averages[i - 1] + 1) // 4, block)
        here = program >= begin
        average = tl.where(here, averages[i], average)
        last = tl.where(here, lasts[i], last)
        source = tl.where(here, sources[i], source)
        if shadows is not None:
            shadow = tl.where(here, shadows[i], shadow)
        first = tl.where(here, begin, first)
    average = _pointer(average, tl.float32, aligned)
    source = _pointer(source, source_dtype, aligned)
    if shadows is not None:
        shadow = _pointer(shadow, shadow_dtype, aligned)
    numel = (last - average.to(tl.int64) + 1) // 4
    start = (program - first) * block
    elements = start + tl.arange(0, block)
    if start + block <= numel:  # no mask, so that loads are 16 bytes wide
        _update(average, source, shadow, elements, None, weight)
    else:
        _update(average, source, shadow, elements, elements < numel, weight)


@triton.jit
def _pointer(address: tl.tensor, dtype: tl.constexpr, aligned: tl.constexpr) -> tl.tensor:
    pointer = address.to(tl.pointer_type(dtype))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _update(averages: tl.tensor, sources: tl.tensor, shadows: tl.tensor, elements: tl.tensor, mask: tl.tensor, weight: tl.tensor) -> None:
    average = tl.load(averages + elements, mask=mask)
    source = tl.load(sources + elements, mask=mask).to(tl.float32)
    step = source - average
    # As torch.lerp: exact at both ends.
    average = tl.where(weight < 0.5, average + weight * step, source - (1 - weight) * step)
    tl.store(averages + elements, average, mask=mask)
    if shadows is not None:
        store(shadows + elements, average, mask)
