"""Measures time, memory and kernels of the contenders, each in its own process."""

import time
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

from ..memory import PeakMemory, return_freed_memory
from ..processes import Worker, WorkerError
from ..provenance import measured_on
from .contenders import Contender, Times, build, check, contenders
from .rows import Memory, Row, row_of

__all__ = ["Kernel", "Profile", "Start", "begin", "kernels", "measure", "memory", "time_for", "times"]

WARM_UP = 2
MAX_TIMED = 2000
"""Maximum number of timed iterations."""


class Start(NamedTuple):
    """Fields of a :class:`Row` that are known after a contender's warm-up."""

    autocast: str
    tf32: str
    captured: bool
    notes: str
    warm_up_seconds: float


@dataclass(frozen=True)
class Kernel:
    """A kernel that an iteration launches; on a CPU a PyTorch operator."""

    name: str
    calls_per_iteration: float
    us_per_iteration: float
    share: float
    """Fraction of the time of all kernels, from 0 to 1."""


@dataclass(frozen=True)
class Profile:
    """The kernels of an iteration."""

    calls_per_iteration: float
    seconds_per_iteration: float
    """Sum over the kernels; kernels that overlap are counted in full."""
    most_expensive: list[Kernel]
    """In descending order of time."""


def measure(
    recipe: Recipe,
    device: torch.device,
    precision: PrecisionName,
    turns: int,
    command: str,
    *,
    compiled_engine: bool = False,
    on_failure: Callable[[str], None] = lambda line: None,
) -> Iterator[list[Row]]:
    """Time all contenders with untrained networks, and yield the rows so far after each measurement.

    On a CPU the contenders' iterations are interleaved, and peak memory is measured afterwards, except of compiled contenders. On a GPU
    each contender runs alone. Every contender has its own process, because malloc's settings and PyTorch's caching
    allocator are per process.

    Args:
        recipe: recipe to run.
        device: device to run on.
        precision: precision of the engine and of the compiled plain loop.
        turns: number of timed iterations.
        command: command line, recorded in the rows.
        compiled_engine: also time the engine under torch.compile.
        on_failure: called with one line for each contender that fails on a GPU; the others are still measured.

    Raises:
        DfkdError: The plain loop does not implement the recipe's method.
        WorkerError: A contender failed on a CPU.
    """
    check(recipe)
    shared = {"precision": precision, "provenance": measured_on(device, command)}
    starts: dict[str, Start] = {}
    seconds: dict[str, Times] = {}
    peaks: dict[str, Memory] = {}

    def rows() -> list[Row]:
        interleaved = device.type == "cpu"
        return [
            row_of(recipe, name, seconds, peaks.get(name), interleaved=interleaved, **shared, **starts[name]._asdict()) for name in seconds
        ]

    builders = {
        name: partial(build, recipe, device, precision, name, compiled_engine=compiled_engine)
        for name in contenders(recipe, device, precision, compiled_engine=compiled_engine)
    }
    if device.type == "cuda":
        for name, builder in builders.items():
            try:
                starts[name], seconds[name], peaks[name] = _alone(builder, device, turns)
            except WorkerError as error:
                on_failure(f"{name}: {error}")
            else:
                yield rows()
        return
    starts, seconds = _interleaved(builders, device, turns)
    yield rows()
    for name, builder in builders.items():
        if "compile" not in name:  # the compiler's own memory would dominate
            peaks[name] = _memory_alone(partial(builder, malloc_reuse=False), device)
            yield rows()


def _alone(build: Callable[[], Contender], device: torch.device, turns: int) -> tuple[Start, Times, Memory]:
    with Worker() as worker:
        return worker.call(begin, build, device), worker.call(times, turns), worker.call(memory, device)


def _interleaved(
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
        worker.call(return_freed_memory)
        worker.call(begin, build, device)
        return worker.call(memory, device)


_contender: list[Contender] = []
"""The contender of this process, after :func:`begin`."""


def begin(build: Callable[[], Contender], device: torch.device) -> Start:
    """Build this process's contender and run its warm-up iterations.

    Raises:
        DfkdError: The steps should be captured as CUDA graphs and run eagerly instead.
    """
    contender = build()
    _contender[:] = [contender]
    start = time.perf_counter()
    contender.run(WARM_UP)
    seconds = time.perf_counter() - start
    notes = "; ".join(contender.notes)
    if not contender.capture_succeeded():
        raise DfkdError(notes or "the steps were not captured, for an unknown reason")
    return Start(contender.autocast, _tf32(device, contender.autocast), contender.captured, notes, seconds)


def times(iterations: int) -> Times:
    """Run ``iterations`` iterations of this process's contender; returns their times."""
    return _contender[0].run(iterations)


def time_for(seconds: float, minimum: int) -> Times:
    """Time as many iterations as fit into ``seconds``, between ``minimum`` and ``MAX_TIMED``; returns their times."""
    first = times(1)[0][1]
    return times(min(max(minimum, int(seconds / first)), MAX_TIMED))


def memory(device: torch.device) -> Memory:
    """Run one iteration of this process's contender; returns its peak memory."""
    contender, peak = _contender[0], PeakMemory(device)
    student: list[float] = []
    hook = contender.student_optimizer.register_step_post_hook(lambda *_: student.append(peak.mib()))
    contender.run(1)
    hook.remove()
    # A replayed graph calls no hook, and the student's and the generator's graphs share a memory pool: the student's part is unknown.
    return Memory(peak.mib(), student[-1] if student else None, peak.allocated_mib(), peak.reserved_mib())


def kernels(device: torch.device, iterations: int, count: int) -> Profile:
    """Profile ``iterations`` iterations of this process's contender; returns the totals and the ``count`` most expensive kernels.

    Raises:
        DfkdError: The profiler recorded no kernels.
    """
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        _contender[0].run(iterations)
    device_type = DeviceType.CUDA if on_gpu else DeviceType.CPU
    # An annotated range contains kernels and is not a kernel itself.
    events = [event for event in profiler.key_averages() if event.device_type == device_type and not event.is_user_annotation]
    us = {event.key: float(event.self_device_time_total if on_gpu else event.self_cpu_time_total) for event in events}
    calls = {event.key: event.count for event in events}
    total = sum(us.values())
    if not total:
        raise DfkdError("the profiler recorded no kernels")
    return Profile(
        sum(calls.values()) / iterations,
        total / iterations / 1e6,
        [
            Kernel(name, calls[name] / iterations, round(us[name] / iterations, 2), round(us[name] / total, 4))
            for name in sorted(us, key=us.__getitem__, reverse=True)[:count]
        ],
    )


def _tf32(device: torch.device, autocast: str) -> str:
    """Return which float32 operations may use TF32 on a GPU. Under autocast only the last layers, matrix products, compute in float32."""
    if device.type != "cuda":
        return ""
    allowed: dict[str, bool] = {
        "convolutions": torch.backends.cudnn.allow_tf32 and autocast == "fp32",
        "matrix products": torch.backends.cuda.matmul.allow_tf32,
    }
    return ", ".join(name for name, is_allowed in allowed.items() if is_allowed) or "nowhere"
