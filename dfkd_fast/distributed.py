"""The processes that torchrun started, and what they tell each other; for a single process everything here is nothing."""

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from threading import Thread
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from .environment import whole_number
from .errors import DfkdError, first_line

__all__ = [
    "all_gather",
    "all_reduce_sum",
    "any_rank",
    "average_",
    "barrier",
    "broadcast_",
    "failed_elsewhere",
    "fresh_part",
    "local",
    "mean",
    "process_group",
    "rank",
    "reports_exit",
    "restarted",
    "world_size",
]

T = TypeVar("T")
SETTLING = 0.1
"""Seconds after the last message in which gloo's threads come to rest."""
GRACE = 0.5
"""Seconds that other processes give rank 0 to say an error that all of them have."""


def rank() -> int:
    """Of this process in its group, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """How many processes the group has."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def restarted() -> bool:
    """Whether torchrun started this process anew, after one of the group had failed."""
    return whole_number("TORCHELASTIC_RESTART_COUNT", default=0) > 0


def local(device: torch.device) -> torch.device:
    """This process's own device of that type.

    Raises:
        DfkdError: more processes were started on this machine than it has GPUs.
    """
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        index, count = whole_number("LOCAL_RANK"), torch.cuda.device_count()
        if index >= count:
            raise DfkdError(f"environment variable LOCAL_RANK = {index}: must be less than {count}, the number of GPUs here")
        return torch.device("cuda", index)
    return device


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Inside, the processes that torchrun started are a group: NCCL for what is on a GPU, gloo for the rest.

    Raises:
        DfkdError: the environment does not say which of them this is and where they meet, or they cannot meet there.
    """
    size = whole_number("WORLD_SIZE", default=1)
    if size == 1:
        yield
        return
    if (number := whole_number("RANK")) >= size:
        raise DfkdError(f"environment variable RANK = {number}: must be less than WORLD_SIZE = {size}")
    address, port = os.environ.get("MASTER_ADDR"), whole_number("MASTER_PORT")
    if not address:
        raise DfkdError("environment variable MASTER_ADDR is not set: torchrun sets it")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        store, rank, world_size = _interruptible(_meet)
    except DistError as error:
        raise DfkdError(f"MASTER_ADDR = {address!r}, MASTER_PORT = {port}: the processes cannot meet there: {first_line(error)}") from error
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        yield
    finally:
        distributed.destroy_process_group()
        # gloo's threads drop their tensors a moment after whoever waited for them went on, and need the GIL for that: where the
        # interpreter has ended by then, they abort the process (PyTorch 2.14).
        time.sleep(SETTLING)


def _meet() -> tuple[Store, int, int]:
    store, rank, world_size = next(rendezvous("env://"))
    return fresh_part(store, rank, world_size), rank, world_size


def _interruptible(wait: Callable[[], T]) -> T:
    """What a function returns that may wait in C++ for long, where Python handles no signal: it runs in a thread of its own."""
    outcome: list[T | Exception] = []

    def run() -> None:
        try:
            outcome.append(wait())
        except Exception as error:
            outcome.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def failed_elsewhere(*, wait: float) -> bool:
    """Whether another process of this attempt has said why the command ends; only torchrun's processes can know.

    Args:
        wait: seconds in which it still may.
    """
    try:
        store = _launchers_store()
        deadline = time.monotonic() + wait
        while not store.check([_ended()]) and time.monotonic() < deadline:
            time.sleep(0.01)
        return bool(store.check([_ended()]))
    except (DistError, KeyError, OSError, RuntimeError, ValueError):
        return False


def reports_exit() -> bool:
    """Whether this process is to say why the command ends: only the first that asks is, or any where torchrun's store is out of reach.

    Rank 0 need not wait; the others give it a moment, so that an error that all of them have is said by it.
    """
    if os.environ.get("RANK", "0") != "0" and failed_elsewhere(wait=GRACE):
        return False
    try:
        return int(_launchers_store().add(_ended(), 1)) == 1
    except (DistError, KeyError, OSError, RuntimeError, ValueError):
        return True


def _ended() -> str:
    return f"dfkd_fast/ended/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _launchers_store() -> Store:
    """The store that torchrun keeps beside its processes: it can be reached before they are a group, and after."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise ValueError("not started by torchrun")
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))


def fresh_part(store: Store, rank: int, world_size: int) -> Store:
    """A part of the store that no earlier attempt wrote into, the same for all processes.

    torchrun keeps one store over its restarts, and the addresses of processes that are gone lie in it under the names that
    the new ones look up. Nothing that a process is told counts the attempts the same on every machine, so process 0 names a
    new part to whoever asks, and asks on until each of this attempt's processes has it: an older question may lie there too.
    """
    if rank > 0:
        question = uuid.uuid4().hex
        store.set(f"dfkd_fast/question/{rank}", question)
        part = store.get(f"dfkd_fast/answer/{question}").decode()
        store.set(f"dfkd_fast/known/{part}/{rank}", "")
        return PrefixStore(part, store)
    part = uuid.uuid4().hex
    for other in range(1, world_size):
        while not store.check([f"dfkd_fast/known/{part}/{other}"]):
            question = store.get(f"dfkd_fast/question/{other}").decode()
            store.set(f"dfkd_fast/answer/{question}", part)
            time.sleep(0.01)
    return PrefixStore(part, store)


def all_reduce_sum(tensor: Tensor) -> Tensor:
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
        return all_reduce_sum(tensor.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient.clone())


@torch.no_grad()
def average_(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their means over the processes, all of a dtype in one message."""
    if world_size() == 1 or not tensors:
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = all_reduce_sum(torch.cat([tensor.reshape(-1) for tensor in alike])).div_(world_size())
        parts = flat.split([tensor.numel() for tensor in alike])
        torch._foreach_copy_(alike, [part.view(tensor.shape) for part, tensor in zip(parts, alike, strict=True)])


@torch.no_grad()
def broadcast_(tensors: Sequence[Tensor]) -> None:
    """Give every process the first one's tensors."""
    if world_size() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, 0)


def all_gather(found: list[Any]) -> list[Any]:
    """Every process's list, one after the other."""
    if world_size() == 1:
        return found
    everyone: list[Any] = [None] * world_size()
    distributed.all_gather_object(everyone, found)
    return [entry for theirs in everyone for entry in theirs]


def any_rank(flag: bool) -> bool:
    """Whether any process says so; through gloo, so that no GPU is waited for."""
    return flag if world_size() == 1 else bool(all_reduce_sum(torch.tensor(float(flag))))


def barrier() -> None:
    """Wait for the others."""
    any_rank(False)
