"""Collectives and process-group set-up under torchrun. With a single process every collective returns its input."""

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
    "fresh_namespace",
    "local_device",
    "mean",
    "process_group",
    "rank",
    "reports_exit",
    "restarted",
    "world_size",
]

T = TypeVar("T")
GLOO_SHUTDOWN = 0.1
"""Seconds that gloo's threads may need after the last collective to release their tensors."""
REPORT_GRACE = 0.5
"""Seconds that other ranks wait for rank 0 to report an error that all of them raise."""


def rank() -> int:
    """Returns the rank of this process; 0 without a process group."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """Returns the number of processes; 1 without a process group."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def restarted() -> bool:
    """Whether torchrun restarted this process after another one of the group failed."""
    return whole_number("TORCHELASTIC_RESTART_COUNT", default=0) > 0


def local_device(device: torch.device) -> torch.device:
    """Returns the device of this process: ``cuda:LOCAL_RANK`` for a CUDA device under torchrun, otherwise the device itself.

    Raises:
        DfkdError: ``LOCAL_RANK`` is not less than the number of GPUs.
    """
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        index, count = whole_number("LOCAL_RANK"), torch.cuda.device_count()
        if index >= count:
            raise DfkdError(f"environment variable LOCAL_RANK = {index}: must be less than {count}, the number of GPUs here")
        return torch.device("cuda", index)
    return device


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Context manager that creates the default process group from torchrun's environment: NCCL for CUDA tensors, gloo for others.

    Without torchrun, or with one process, it does nothing.

    Raises:
        DfkdError: ``RANK``, ``MASTER_ADDR`` or ``MASTER_PORT`` is missing or invalid, or the rendezvous fails.
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
        store, rank, world_size = _interruptible(_rendezvous)
    except DistError as error:
        raise DfkdError(f"MASTER_ADDR = {address!r}, MASTER_PORT = {port}: rendezvous failed: {first_line(error)}") from error
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        yield
    finally:
        distributed.destroy_process_group()
        # gloo's threads release their tensors shortly after a collective returns, and need the GIL to do so. If the interpreter
        # has exited by then, they abort the process (PyTorch 2.14).
        time.sleep(GLOO_SHUTDOWN)


def _rendezvous() -> tuple[Store, int, int]:
    store, rank, world_size = next(rendezvous("env://"))
    return fresh_namespace(store, rank, world_size), rank, world_size


def _interruptible(wait: Callable[[], T]) -> T:
    """Runs a blocking C++ call in a thread, so that Python can handle signals meanwhile; returns its result."""
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
    """Whether another process of this attempt has reported why the command exits; always False without torchrun.

    Args:
        wait: Maximum time to wait for such a report, in seconds.
    """
    try:
        store = _torchrun_store()
        deadline = time.monotonic() + wait
        while not store.check([_exit_key()]) and time.monotonic() < deadline:
            time.sleep(0.01)
        return bool(store.check([_exit_key()]))
    except (DistError, KeyError, OSError, RuntimeError, ValueError):
        return False


def reports_exit() -> bool:
    """Whether this process should report why the command exits: True for the first caller of the group only.

    Other ranks wait :data:`REPORT_GRACE` seconds for rank 0, which therefore reports an error that all ranks raise. Every process
    reports if torchrun's store cannot be reached.
    """
    if os.environ.get("RANK", "0") != "0" and failed_elsewhere(wait=REPORT_GRACE):
        return False
    try:
        return int(_torchrun_store().add(_exit_key(), 1)) == 1
    except (DistError, KeyError, OSError, RuntimeError, ValueError):
        return True


def _exit_key() -> str:
    return f"dfkd_fast/ended/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _torchrun_store() -> Store:
    """Connects to the TCP store of torchrun's agent, which is available before and after the process group."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise ValueError("not started by torchrun")
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))


def fresh_namespace(store: Store, rank: int, world_size: int) -> Store:
    """Returns the store under a prefix that is common to all ranks and unused by earlier attempts.

    torchrun keeps one store across restarts, which still holds the addresses of the previous processes. No variable in the
    environment counts the attempts equally on every machine, so rank 0 chooses a prefix and answers requests for it until every
    rank of this attempt has acknowledged it; requests of earlier attempts may be answered, too.
    """
    if rank > 0:
        request = uuid.uuid4().hex
        store.set(f"dfkd_fast/request/{rank}", request)
        prefix = store.get(f"dfkd_fast/response/{request}").decode()
        store.set(f"dfkd_fast/acknowledged/{prefix}/{rank}", "")
        return PrefixStore(prefix, store)
    prefix = uuid.uuid4().hex
    for other in range(1, world_size):
        while not store.check([f"dfkd_fast/acknowledged/{prefix}/{other}"]):
            request = store.get(f"dfkd_fast/request/{other}").decode()
            store.set(f"dfkd_fast/response/{request}", prefix)
            time.sleep(0.01)
    return PrefixStore(prefix, store)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sums a tensor over all processes in place; returns it."""
    if world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor


def mean(tensor: Tensor) -> Tensor:
    """Returns the mean of a tensor over all processes. Differentiable: the backward pass sums the gradients of all processes."""
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
    """Replaces tensors by their means over all processes, with one all-reduce per dtype."""
    if world_size() == 1 or not tensors:
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        bucket = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = all_reduce_sum(torch.cat([tensor.reshape(-1) for tensor in bucket])).div_(world_size())
        means = flat.split([tensor.numel() for tensor in bucket])
        torch._foreach_copy_(bucket, [value.view(tensor.shape) for value, tensor in zip(means, bucket, strict=True)])


@torch.no_grad()
def broadcast_(tensors: Sequence[Tensor]) -> None:
    """Overwrites tensors with those of rank 0."""
    if world_size() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, 0)


def all_gather(entries: list[Any]) -> list[Any]:
    """Returns the lists of all processes, concatenated in the order of their ranks."""
    if world_size() == 1:
        return entries
    gathered: list[Any] = [None] * world_size()
    distributed.all_gather_object(gathered, entries)
    return [entry for rank_entries in gathered for entry in rank_entries]


def any_rank(flag: bool) -> bool:
    """Whether the flag is True on any process. Uses gloo, so that the GPU is not synchronized."""
    return flag if world_size() == 1 else bool(all_reduce_sum(torch.tensor(float(flag))))


def barrier() -> None:
    """Waits for all processes."""
    any_rank(False)
