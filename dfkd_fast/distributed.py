"""The processes that torchrun started; one, where it did not."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

__all__ = ["gathered", "local", "process_group", "rank", "summed", "world_size"]


def rank() -> int:
    """Of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local(device: torch.device) -> torch.device:
    """This process's own device of that type."""
    if device.type == "cuda" and world_size() > 1:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The processes can talk to each other inside; nothing is done for a single one."""
    if world_size() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def summed(tensor: Tensor) -> Tensor:
    """The sum of every process's tensor, in place."""
    if distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor


def gathered(found: list[Any]) -> list[Any]:
    """Every process's list, one after the other."""
    if not distributed.is_initialized():
        return found
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, found)
    return [entry for theirs in everyone for entry in theirs]
