"""Interleaved timing of several providers of one case, so that fluctuations of the machine affect all of them.

In each round, every provider runs once in random order, for one or more measured calls. Short calls are preceded by an unmeasured
one, which restores caches and thread pools.

On a CPU, ``time.perf_counter`` measures a call; its data may be cached, as in a training step. On a GPU, a pair of events measures
each call after the L2 cache was flushed. Events give the device time only if the host has issued the call before the device
reaches it: ``ready`` captures a call in a CUDA graph and inserts a device sleep that hides the launch overhead.
"""

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from dfkd_fast.errors import first_line

from .workload import Trial

__all__ = ["Ready", "copy_bandwidth", "measure", "peak_memory_bytes", "ready", "timer_for"]

CAPTURE_FAILED = "capture failed"
"""In ``Ready.timed``: the capture itself failed, after which PyTorch 2.11 may consider it still active."""
CASE_SECONDS = 1.0
TURN_SECONDS = 0.005
ROUNDS = (5, 30)
CALLS = (1, 100)
WARM_UP = 3
MIN_SLEEP_CYCLES, MAX_SLEEP_CYCLES = 1 << 17, 1 << 27  # at 1 to 2 GHz
FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU
COPIED_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}

Clock = Callable[[], float]
Timer = Callable[[Trial, int, bool], list[float]]
"""``timer(trial, calls, warm_up)`` returns the seconds of each call; with ``warm_up``, an unmeasured call comes first."""


class Ready(NamedTuple):
    """A trial prepared for measurement."""

    trial: Trial
    timed: str
    """How time is measured, see ``Row.timed``."""


def timer_for(device: torch.device) -> Timer:
    """Return the timer for a device."""
    if device.type == "cuda":
        return partial(_time_on_gpu, torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device))
    return _time_on_cpu


def measure(
    trials: Mapping[str, Trial], timer: Timer, repeats: int | None, case_seconds: float = CASE_SECONDS, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Return the seconds of each measured call, by trial: ``repeats`` calls, or as many as fit into ``case_seconds``, within limits."""
    seconds: dict[str, list[float]] = {name: [] for name in trials}
    with _no_garbage_collection():
        estimates, costs = {}, {}
        for name, trial in trials.items():
            estimates[name], costs[name] = _estimate(trial, timer, clock)
        calls, rounds = dict.fromkeys(trials, 1), repeats
        if rounds is None:
            calls = {name: _clamp(CALLS, TURN_SECONDS / cost) for name, cost in costs.items()}
            rounds = _clamp(ROUNDS, case_seconds / (sum(cost * calls[name] for name, cost in costs.items()) or 1))
        shuffle, order = random.Random(0).shuffle, list(trials)
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                seconds[name] += timer(trials[name], calls[name], estimates[name] < TURN_SECONDS)
    return seconds


def ready(trial: Trial, device: torch.device) -> Ready:
    """Prepare a trial so that launch overhead is not measured on a GPU."""
    if device.type != "cuda":
        return Ready(trial, "wall clock")
    timed = "behind a sleep"
    if trial.capturable:
        try:
            trial, timed = _captured(trial, device), "graph replay"
        except _CaptureFailedError as error:
            timed += f", {CAPTURE_FAILED}: {error}"
        except RuntimeError as error:
            timed += f", no graph: {first_line(error)}"
    cycles = MIN_SLEEP_CYCLES
    while not all(_host_time_is_hidden(trial, cycles, device) for _ in range(3)):
        cycles *= 2
        if cycles > MAX_SLEEP_CYCLES:
            return Ready(trial, "with the host's time, which no sleep hides")
    return Ready(replace(trial, sleep_cycles=2 * cycles), timed)  # twice, for occasional delays of the host


def peak_memory_bytes(trial: Trial, device: torch.device) -> int | None:
    """Return the peak memory of a call in addition to its inputs; None on a CPU."""
    if device.type != "cuda":
        return None
    with trial.context():
        prepared = trial.prepare()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        trial.run(prepared)
        torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def copy_bandwidth(timer: Timer, device: torch.device) -> float:
    """Return the bandwidth in bytes/s, read plus written, of copying a tensor much larger than the caches."""
    source = torch.rand(COPIED_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    trial = Trial(lambda _: target.copy_(source), dict, torch.no_grad)
    return 2 * source.nbytes / sorted(timer(trial, 9, True))[4]


def _estimate(trial: Trial, timer: Timer, clock: Clock) -> tuple[float, float]:
    """Return the seconds of a call without and with its overhead: preparation, cache flush and sleep.

    The minimum of three, because another process may interrupt a call.
    """
    times, costs = [], []
    for _ in range(3):
        start = clock()
        times += timer(trial, 1, False)
        costs.append(clock() - start)
    return min(times), min(costs)


def _time_on_cpu(trial: Trial, calls: int, warm_up: bool) -> list[float]:
    seconds = []
    with trial.context():
        if warm_up:
            trial.run(trial.prepare())
        for _ in range(calls):
            prepared = trial.prepare()
            start = time.perf_counter()
            result = trial.run(prepared)
            seconds.append(time.perf_counter() - start)
            del prepared, result  # freed outside the measured time
    return seconds


def _captured(trial: Trial, device: torch.device) -> Trial:
    """Return a trial that replays a CUDA graph of one call.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    # Everything inside the stream context, because a failed capture leaves its stream current.
    with trial.context(), torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            trial.run(trial.prepare())
        with _synchronization_is_an_error():  # a synchronization detected during capture would leave random generators unusable
            trial.run(trial.prepare())
        torch.cuda.synchronize(device)
        try:
            with torch.cuda.graph(graph, stream=stream):
                results = trial.run(trial.prepare())
        except RuntimeError as error:
            raise _CaptureFailedError(first_line(error)) from error

    def replay(_: object) -> object:
        graph.replay()
        return results  # keeps the memory that a replay writes to allocated

    return replace(trial, run=replay, prepare=lambda: None)


class _CaptureFailedError(RuntimeError):
    """The capture started but failed."""


def _host_time_is_hidden(trial: Trial, cycles: int, device: torch.device) -> bool:
    """Return whether the host issues a complete call before the device finishes a sleep of ``cycles``."""
    start = torch.cuda.Event()
    with trial.context():
        prepared = trial.prepare()
        torch.cuda.synchronize(device)
        torch.cuda._sleep(cycles)
        start.record()
        trial.run(prepared)
        hidden = not start.query()
        torch.cuda.synchronize(device)
    return hidden


@contextmanager
def _synchronization_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _time_on_gpu(flush_buffer: torch.Tensor, trial: Trial, calls: int, warm_up: bool) -> list[float]:
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(calls)] for _ in range(2))
    with trial.context():
        if warm_up:
            trial.run(trial.prepare())
        for start, end in zip(starts, ends, strict=True):
            prepared = trial.prepare()
            flush_buffer.zero_()
            if trial.sleep_cycles:
                torch.cuda._sleep(trial.sleep_cycles)
            start.record()
            trial.run(prepared)
            end.record()
    torch.cuda.synchronize(flush_buffer.device)
    return [start.elapsed_time(end) / 1000 for start, end in zip(starts, ends, strict=True)]


def _clamp(limits: tuple[int, int], number: float) -> int:
    return int(min(max(number, limits[0]), limits[1]))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
