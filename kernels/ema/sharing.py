"""Overlapping tensors: tied weights are updated once; overlap that makes the result depend on the order is an error."""

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import disjoint, overlaps_itself, share_memory, span

__all__ = ["Lists", "deduplicate"]

Lists = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor] | None]
"""Averages, sources and shadows."""


def deduplicate(lists: Lists) -> Lists:
    """Return the lists without repeated pairs.

    Raises:
        ValueError: a written tensor overlaps another tensor, so that the result would depend on the order of the updates.
    """
    if torch.compiler.is_compiling():  # no data pointers
        return lists
    averages, sources, shadows = lists
    if not all(map(Tensor.is_contiguous, averages)):
        _check_elements("averages", averages)
        _check_elements("shadows", shadows or ())
    if disjoint([*averages, *sources, *(shadows or ())]):
        return lists
    groups = [*zip(averages, sources, strict=True)] if shadows is None else [*zip(averages, sources, shadows, strict=True)]
    first: dict[object, int] = {}
    for index, group in enumerate(groups):
        first.setdefault(tuple((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) for tensor in group), index)
    unique = [*first.values()]
    _check_disjoint([_Member(*span(tensor), index, role, tensor) for index in unique for role, tensor in enumerate(groups[index])])
    return tuple(None if tensors is None else [tensors[index] for index in unique] for tensors in lists)  # type: ignore[return-value]


class _Member(NamedTuple):
    """A tensor of the lists and its address range."""

    start: int
    end: int
    pair: int
    role: int
    tensor: Tensor

    def __str__(self) -> str:
        return f"{('averages', 'sources', 'shadows')[self.role]}[{self.pair}]"


def _check_elements(name: str, tensors: Sequence[Tensor]) -> None:
    for index, tensor in enumerate(tensors):
        if tensor.layout != torch.strided:
            raise ValueError(f"{name}[{index}] must have the layout torch.strided, not {tensor.layout}")
        if not tensor.is_contiguous() and overlaps_itself(tensor):
            layout = f"strides {tensor.stride()} of shape {tuple(tensor.shape)}"
            raise ValueError(f"{name}[{index}] must not overlap itself: {layout}")


def _check_disjoint(members: Sequence[_Member]) -> None:
    open_: list[_Member] = []
    for member in sorted((member for member in members if member.end), key=attrgetter("start")):
        open_ = [other for other in open_ if other.end > member.start]
        for other in open_:
            if not _may_alias(member, other) and share_memory(member.tensor, other.tensor):
                raise ValueError(f"{other} and {member} share memory, so that the result would depend on the order of the updates")
        open_.append(member)


def _may_alias(one: _Member, other: _Member) -> bool:
    """Return whether two tensors may overlap: two sources, or tensors of one pair with identical addresses."""
    both_sources = one.role == other.role == 1
    return both_sources or (one.pair, one.start, one.tensor.dtype) == (other.pair, other.start, other.tensor.dtype)
