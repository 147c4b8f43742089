"""How contenders are measured: their times, their memory and their kernels, each in a process of its own."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dfkd_fast import DfkdError, Recipe
from dfkd_fast.engine.device import device_name
from dfkd_fast.engine.precision import PrecisionName

from .. import provenance
from ..memory import PeakMemory, give_freed_memory_back
from .contenders import Contender, Times, build, check, contenders
from .process import Worker, WorkerError
from .rows import Memory, Row, circumstances, row_of

__all__ = ["Kernel", "Profile", "Start", "begin", "kernels", "measure", "memory", "time_for", "times"]

WARM_UP = 2
MOST = 2000
"""Iterations that are timed at most, however short they are."""


class Start(NamedTuple):
    """What a contender turned out to be: fields of a :class:`Row`."""

    autocast: str
    tf32: str
    captured: bool
    remarks: str


@dataclass(frozen=True)
class Kernel:
    """A kernel of an iteration; on a CPU an operator of PyTorch."""

    name: str
    calls_per_iteration: float
    us_per_iteration: float
    share: float
    """Of the time of all kernels, from 0 to 1."""


@dataclass(frozen=True)
class Profile:
    """The kernels of an iteration."""

    calls_per_iteration: float
    seconds_per_iteration: float
    """Summed over the kernels, so that those that ran at once count twice."""
    dearest: list[Kernel]
    """The dearest first."""


def measure(
    recipe: Recipe,
    device: torch.device,
    precision: PrecisionName,
    turns: int,
    command: str,
    *,
    compiled_engine: bool = False,
    failed: Callable[[str], None] = lambda line: None,
) -> Iterator[list[Row]]:
    """Time all contenders, with untrained networks; yields the rows so far whenever there are more figures.

    On a CPU they take turns, and the memory of those not compiled is measured afterwards. On a GPU one comes after the other, alone
    on the device. Each has a process of its own: malloc is told what to do for all of one, and memory that is kept on a GPU, too.

    Args:
        recipe: what is run.
        device: where.
        precision: of the engine and of the compiled plain loop.
        turns: timed iterations.
        command: the command line, for the rows.
        compiled_engine: whether the engine is timed under torch.compile, too.
        failed: told in a line of a contender that failed on a GPU; the others go on.

    Raises:
        DfkdError: the plain loop does not know the recipe's method.
    """
    check(recipe)
    shared = circumstances(recipe, precision, device_name(device), provenance.commit(), command)
    found: dict[str, Times] = {}
    starts: dict[str, Start] = {}
    needed: dict[str, Memory] = {}

    def rows() -> list[Row]:
        return [
            row_of(recipe, name, found, needed.get(name), shared, in_turns=device.type == "cpu", **starts[name]._asdict()) for name in found
        ]

    builds = {
        name: partial(build, recipe, device, precision, name, compiled_engine=compiled_engine)
        for name in contenders(recipe, device, precision, compiled_engine=compiled_engine)
    }
    if device.type == "cuda":
        for name, of_name in builds.items():
            try:
                starts[name], found[name], needed[name] = _alone(of_name, device, turns)
            except WorkerError as error:
                failed(f"{name}: {error}")
            else:
                yield rows()
        return
    starts, found = _in_turns(builds, device, turns)
    yield rows()
    for name, of_name in builds.items():
        if "compiled" not in name:
            needed[name] = _memory_alone(partial(of_name, keep_memory=False), device)
            yield rows()


def _alone(build: Callable[[], Contender], device: torch.device, turns: int) -> tuple[Start, Times, Memory]:
    with Worker() as worker:
        return worker.call(begin, build, device), worker.call(times, turns), worker.call(memory, device)


def _in_turns(builds: Mapping[str, Callable[[], Contender]], device: torch.device, turns: int) -> tuple[dict[str, Start], dict[str, Times]]:
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker()) for name in builds}
        starts = {name: worker.call(begin, builds[name], device) for name, worker in workers.items()}
        found: dict[str, Times] = {name: [] for name in builds}
        for _ in range(turns):
            for name, worker in workers.items():
                found[name] += worker.call(times, 1)
    return starts, found


def _memory_alone(build: Callable[[], Contender], device: torch.device) -> Memory:
    with Worker() as worker:
        worker.call(give_freed_memory_back)
        worker.call(begin, build, device)
        return worker.call(memory, device)


_contender: list[Contender] = []
"""Of this process, once it has begun."""


def begin(build: Callable[[], Contender], device: torch.device) -> Start:
    """Build the one contender of this process, and take its first iterations.

    Raises:
        DfkdError: its steps could not be captured as CUDA graphs, and run eagerly.
    """
    contender = build()
    _contender[:] = [contender]
    contender.run(WARM_UP)
    remarks = "; ".join(contender.remarks)
    if not contender.holds():
        raise DfkdError(remarks or "its steps were not captured, and nothing says why")
    return Start(contender.autocast, _tf32(device, contender.autocast), contender.captured, remarks)


def times(iterations: int) -> Times:
    """Of so many iterations of this process's contender."""
    return _contender[0].run(iterations)


def time_for(seconds: float, fewest: int) -> Times:
    """Of as many iterations as fit into some seconds, but at least so many."""
    first = times(1)[0][1]
    return times(min(max(fewest, int(seconds / first)), MOST))


def memory(device: torch.device) -> Memory:
    """Of an iteration of this process's contender."""
    contender, peak = _contender[0], PeakMemory(device)
    student: list[float] = []
    hook = contender.student_optimizer.register_step_post_hook(lambda *_: student.append(peak.mib()))
    contender.run(1)
    hook.remove()
    # A replayed graph calls no hook, and the student's shares its memory with the generator's: what is its own cannot be told.
    return Memory(peak.mib(), student[-1] if student else None, peak.allocated_mib(), peak.reserved_mib())


def kernels(device: torch.device, iterations: int, count: int) -> Profile:
    """Of so many iterations of this process's contender; the dearest ``count`` by name.

    Raises:
        DfkdError: the profiler saw none.
    """
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        _contender[0].run(iterations)
    where = DeviceType.CUDA if on_gpu else DeviceType.CPU
    # A range that somebody annotated spans kernels, and is none.
    events = [event for event in profiler.key_averages() if event.device_type == where and not event.is_user_annotation]
    us = {event.key: float(event.self_device_time_total if on_gpu else event.self_cpu_time_total) for event in events}
    calls = {event.key: event.count for event in events}
    total = sum(us.values())
    if not total:
        raise DfkdError("the profiler saw no kernels")
    return Profile(
        sum(calls.values()) / iterations,
        total / iterations / 1e6,
        [
            Kernel(name, calls[name] / iterations, round(us[name] / iterations, 2), round(us[name] / total, 4))
            for name in sorted(us, key=us.__getitem__, reverse=True)[:count]
        ],
    )


def _tf32(device: torch.device, autocast: str) -> str:
    """What the GPU may round to TF32 on its way; under autocast only the last layers compute in float32, and these multiply matrices."""
    if device.type != "cuda":
        return ""
    allowed: dict[str, bool] = {
        "convolutions": torch.backends.cudnn.allow_tf32 and autocast == "fp32",
        "matrix products": torch.backends.cuda.matmul.allow_tf32,
    }
    return ", ".join(name for name, is_allowed in allowed.items() if is_allowed) or "nowhere"
