"""The processes that torchrun started, and what they tell each other; for a single process everything here is nothing."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

__all__ = [
    "any_of",
    "average_",
    "barrier",
    "broadcast_",
    "gathered",
    "local",
    "mean",
    "process_group",
    "rank",
    "restarted",
    "summed",
    "world_size",
]


def rank() -> int:
    """Of this process in its group, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """How many processes the group has."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def restarted() -> bool:
    """Whether torchrun started this process anew, after one of the group had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def local(device: torch.device) -> torch.device:
    """This process's own device of that type."""
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Inside, the processes that torchrun started are a group: NCCL for what is on a GPU, gloo for the rest."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def summed(tensor: Tensor) -> Tensor:
    """The sum of every process's tensor, in place."""
    if world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor


def mean(tensor: Tensor) -> Tensor:
    """The mean of every process's tensor, differentiable: a gradient goes back to all of them."""
    if world_size() == 1:
        return tensor
    return _Sum.apply(tensor) / world_size()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return summed(tensor.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return summed(gradient.clone())


@torch.no_grad()
def average_(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their means over the processes, all of a dtype in one message."""
    if world_size() == 1 or not tensors:
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = summed(torch.cat([tensor.reshape(-1) for tensor in alike])).div_(world_size())
        parts = flat.split([tensor.numel() for tensor in alike])
        torch._foreach_copy_(alike, [part.view(tensor.shape) for part, tensor in zip(parts, alike, strict=True)])


@torch.no_grad()
def broadcast_(tensors: Sequence[Tensor]) -> None:
    """Give every process the first one's tensors."""
    if world_size() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, 0)


def gathered(found: list[Any]) -> list[Any]:
    """Every process's list, one after the other."""
    if world_size() == 1:
        return found
    everyone: list[Any] = [None] * world_size()
    distributed.all_gather_object(everyone, found)
    return [entry for theirs in everyone for entry in theirs]


def any_of(flag: bool) -> bool:
    """Whether any process says so; through gloo, so that no GPU is waited for."""
    return flag if world_size() == 1 else bool(summed(torch.tensor(float(flag))))


def barrier() -> None:
    """Wait for the others."""
    any_of(False)
