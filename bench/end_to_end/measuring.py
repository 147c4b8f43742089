"""Measures contenders, each in a process of its own: times, memory and kernels."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dfkd_fast import DfkdError, Recipe
from dfkd_fast.choices import PrecisionName

from ..memory import PeakMemory, give_freed_memory_back
from ..processes import Worker, WorkerError
from ..provenance import measured_on
from .contenders import Contender, Times, build, check, contenders
from .rows import Memory, Row, row_of

__all__ = ["Kernel", "Profile", "Start", "begin", "kernels", "measure", "memory", "time_for", "times"]

WARM_UP = 2
MOST = 2000
"""Timed iterations at most, however short they are."""


class Start(NamedTuple):
    """What is known of a contender after its first iterations: fields of a :class:`Row`."""

    autocast: str
    tf32: str
    captured: bool
    notes: str


@dataclass(frozen=True)
class Kernel:
    """A kernel that an iteration runs; on a CPU an operator of PyTorch."""

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
    """Summed over the kernels: the time in which two run at once counts twice."""
    most_expensive: list[Kernel]
    """The most expensive first."""


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
    """Time all contenders, with untrained networks; yield the rows so far whenever there are more figures.

    On a CPU they take turns, and the memory of those not compiled is measured afterwards. On a GPU they run one after the other, alone on
    the device. Each has a process of its own, because malloc's settings and the memory that PyTorch keeps on a GPU are a process's.

    Args:
        recipe: what is run.
        device: where.
        precision: of the engine and of the compiled plain loop.
        turns: timed iterations.
        command: the command line, for the rows.
        compiled_engine: whether the engine is timed under torch.compile, too.
        failed: called with a line on a contender that failed on a GPU; the others are still measured.

    Raises:
        DfkdError: the plain loop does not know the recipe's method.
        WorkerError: a contender failed on a CPU.
    """
    check(recipe)
    shared = {"precision": precision, "provenance": measured_on(device, command)}
    starts: dict[str, Start] = {}
    seconds: dict[str, Times] = {}
    peaks: dict[str, Memory] = {}

    def rows() -> list[Row]:
        in_turns = device.type == "cpu"
        return [row_of(recipe, name, seconds, peaks.get(name), in_turns=in_turns, **shared, **starts[name]._asdict()) for name in seconds]

    builders = {
        name: partial(build, recipe, device, precision, name, compiled_engine=compiled_engine)
        for name in contenders(recipe, device, precision, compiled_engine=compiled_engine)
    }
    if device.type == "cuda":
        for name, builder in builders.items():
            try:
                starts[name], seconds[name], peaks[name] = _alone(builder, device, turns)
            except WorkerError as error:
                failed(f"{name}: {error}")
            else:
                yield rows()
        return
    starts, seconds = _in_turns(builders, device, turns)
    yield rows()
    for name, builder in builders.items():
        if "compiled" not in name:
            peaks[name] = _memory_alone(partial(builder, keep_memory=False), device)
            yield rows()


def _alone(build: Callable[[], Contender], device: torch.device, turns: int) -> tuple[Start, Times, Memory]:
    with Worker() as worker:
        return worker.call(begin, build, device), worker.call(times, turns), worker.call(memory, device)


def _in_turns(
    builders: Mapping[str, Callable[[], Contender]], device: torch.device, turns: int
) -> tuple[dict[str, Start], dict[str, Times]]:
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker()) for name in builders}
        starts = {name: worker.call(begin, builders[name], device) for name, worker in workers.items()}
        seconds: dict[str, Times] = {name: [] for name in builders}
        for _ in range(turns):
            for name, worker in workers.items():
                seconds[name] += worker.call(times, 1)
    return starts, seconds


def _memory_alone(build: Callable[[], Contender], device: torch.device) -> Memory:
    with Worker() as worker:
        worker.call(give_freed_memory_back)
        worker.call(begin, build, device)
        return worker.call(memory, device)


_contender: list[Contender] = []
"""This process's, once :func:`begin` has built it."""


def begin(build: Callable[[], Contender], device: torch.device) -> Start:
    """Build this process's contender, and run its first iterations.

    Raises:
        DfkdError: its steps could not be captured as CUDA graphs, and run eagerly.
    """
    contender = build()
    _contender[:] = [contender]
    contender.run(WARM_UP)
    notes = "; ".join(contender.notes)
    if not contender.holds():
        raise DfkdError(notes or "its steps were not captured, and nothing says why")
    return Start(contender.autocast, _tf32(device, contender.autocast), contender.captured, notes)


def times(iterations: int) -> Times:
    """Run and time so many iterations of this process's contender."""
    return _contender[0].run(iterations)


def time_for(seconds: float, fewest: int) -> Times:
    """Run and time as many iterations as fit into some seconds, but not fewer than ``fewest``."""
    first = times(1)[0][1]
    return times(min(max(fewest, int(seconds / first)), MOST))


def memory(device: torch.device) -> Memory:
    """Run an iteration of this process's contender, and measure its memory."""
    contender, peak = _contender[0], PeakMemory(device)
    student: list[float] = []
    hook = contender.student_optimizer.register_step_post_hook(lambda *_: student.append(peak.mib()))
    contender.run(1)
    hook.remove()
    # A replayed graph calls no hook, and the student's and the generator's graphs share a pool: it is unknown what the student's needs.
    return Memory(peak.mib(), student[-1] if student else None, peak.allocated_mib(), peak.reserved_mib())


def kernels(device: torch.device, iterations: int, count: int) -> Profile:
    """Profile so many iterations of this process's contender, and list its ``count`` most expensive kernels.

    Raises:
        DfkdError: the profiler saw no kernels.
    """
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        _contender[0].run(iterations)
    where = DeviceType.CUDA if on_gpu else DeviceType.CPU
    # An annotated range spans kernels, and is not one itself.
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
    """Where the GPU may use TF32; under autocast only the last layers compute in float32: matrix products."""
    if device.type != "cuda":
        return ""
    allowed: dict[str, bool] = {
        "convolutions": torch.backends.cudnn.allow_tf32 and autocast == "fp32",
        "matrix products": torch.backends.cuda.matmul.allow_tf32,
    }
    return ", ".join(name for name, is_allowed in allowed.items() if is_allowed) or "nowhere"
