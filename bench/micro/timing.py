"""Times of several providers of one case, taken in turn, so that a machine's moods are shared by all.

A turn is some measured calls of one provider. Where calls are short, an unmeasured one comes first: it brings back the
caches and thread pools that the provider before left otherwise. Turns are drawn in random order, round after round.

On a CPU the clock is ``time.perf_counter`` around a call; what it works on may be in the caches, as it is in a
training step. On a GPU a pair of events surrounds each call, behind a write that empties the second-level cache. They give the
device's time only where the host has issued the call before the device reaches it: ``ready`` makes a call the replay of a CUDA
graph, and lets the device sleep in front of it for as long as the host needs.
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

__all__ = ["Ready", "copy_bandwidth", "measure", "peak_memory_bytes", "ready", "turn_on"]

CAPTURE_FAILED = "capture failed"
"""In ``Ready.timed``: an error ended the capture itself, after which PyTorch 2.11 may take it for being under way."""
CASE_SECONDS = 1.0
TURN_SECONDS = 0.005
ROUNDS = (5, 30)
CALLS = (1, 100)
WARM_UP = 3
FEWEST_CYCLES, MOST_CYCLES = 1 << 17, 1 << 27  # of a clock of 1 to 2 GHz
FLUSHED_BYTES = 256 << 20  # several times any GPU's second-level cache
COPIED_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}

Clock = Callable[[], float]
Turn = Callable[[Trial, int, bool], list[float]]
"""Seconds of so many calls, behind an unmeasured one if that is wanted."""


class Ready(NamedTuple):
    """A trial to be measured."""

    trial: Trial
    timed: str
    """How: see ``Row.timed``."""


def turn_on(device: torch.device) -> Turn:
    """How a turn is timed on a device."""
    if device.type == "cuda":
        return partial(_gpu_turn, torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device))
    return _cpu_turn


def measure(
    trials: Mapping[str, Trial], turn: Turn, repeats: int | None, case_seconds: float = CASE_SECONDS, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every measured call: ``repeats`` of them, or as many as fit into ``case_seconds`` for all trials, within limits."""
    seconds: dict[str, list[float]] = {name: [] for name in trials}
    with _no_garbage_collection():
        estimates, costs = {}, {}
        for name, trial in trials.items():
            estimates[name], costs[name] = _estimate(trial, turn, clock)
        calls, rounds = dict.fromkeys(trials, 1), repeats
        if rounds is None:
            calls = {name: _within(CALLS, TURN_SECONDS / cost) for name, cost in costs.items()}
            rounds = _within(ROUNDS, case_seconds / (sum(cost * calls[name] for name, cost in costs.items()) or 1))
        shuffle, order = random.Random(0).shuffle, list(trials)
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                seconds[name] += turn(trials[name], calls[name], estimates[name] < TURN_SECONDS)
    return seconds


def ready(trial: Trial, device: torch.device) -> Ready:
    """Prepare a trial so that on a GPU none of the host's time is measured."""
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
    cycles = FEWEST_CYCLES
    while not all(_hidden(trial, cycles, device) for _ in range(3)):
        cycles *= 2
        if cycles > MOST_CYCLES:
            return Ready(trial, "with the host's time, which no sleep hides")
    return Ready(replace(trial, sleep_cycles=2 * cycles), timed)  # twice, for a host that is slower now and then


def peak_memory_bytes(trial: Trial, device: torch.device) -> int | None:
    """The most memory a call holds beyond what it was given; None on a CPU, whose allocators do not say."""
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


def copy_bandwidth(turn: Turn, device: torch.device) -> float:
    """Bytes a second, read plus written, of copying a tensor far larger than the caches."""
    source = torch.rand(COPIED_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    trial = Trial(lambda _: target.copy_(source), dict, torch.no_grad)
    return 2 * source.nbytes / sorted(turn(trial, 9, True))[4]


def _estimate(trial: Trial, turn: Turn, clock: Clock) -> tuple[float, float]:
    """Seconds of a call, and what it costs with all that surrounds it: what is prepared, flushed or slept before a short one takes longer.

    The least of three: a call that another process interrupted would pass for a long one.
    """
    times, costs = [], []
    for _ in range(3):
        begin = clock()
        times += turn(trial, 1, False)
        costs.append(clock() - begin)
    return min(times), min(costs)


def _cpu_turn(trial: Trial, calls: int, settle: bool) -> list[float]:
    seconds = []
    with trial.context():
        if settle:
            trial.run(trial.prepare())
        for _ in range(calls):
            prepared = trial.prepare()
            begin = time.perf_counter()
            result = trial.run(prepared)
            seconds.append(time.perf_counter() - begin)
            del prepared, result  # freed off the clock
    return seconds


def _captured(trial: Trial, device: torch.device) -> Trial:
    """The trial as a replay of a CUDA graph of one call.

    Raises:
        RuntimeError: it cannot be captured.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    # All of it under the stream: a capture that fails leaves its own current.
    with trial.context(), torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            trial.run(trial.prepare())
        with _waiting_is_an_error():  # found while capturing, it would leave random generators unusable
            trial.run(trial.prepare())
        torch.cuda.synchronize(device)
        try:
            with torch.cuda.graph(graph, stream=stream):
                results = trial.run(trial.prepare())
        except RuntimeError as error:
            raise _CaptureFailedError(first_line(error)) from error

    def replay(_: object) -> object:
        graph.replay()
        return results  # where a replay writes: it must not be given to others

    return replace(trial, run=replay, prepare=lambda: None)


class _CaptureFailedError(RuntimeError):
    """The capture was begun and could not be ended well."""


def _hidden(trial: Trial, cycles: int, device: torch.device) -> bool:
    """Whether the host has issued a whole call before the device, asleep for so many cycles, reaches it."""
    begin = torch.cuda.Event()
    with trial.context():
        prepared = trial.prepare()
        torch.cuda.synchronize(device)
        torch.cuda._sleep(cycles)
        begin.record()
        trial.run(prepared)
        hidden = not begin.query()
        torch.cuda.synchronize(device)
    return hidden


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _gpu_turn(flushed: torch.Tensor, trial: Trial, calls: int, settle: bool) -> list[float]:
    begins, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(calls)] for _ in range(2))
    with trial.context():
        if settle:
            trial.run(trial.prepare())
        for begin, end in zip(begins, ends, strict=True):
            prepared = trial.prepare()
            flushed.zero_()
            if trial.sleep_cycles:
                torch.cuda._sleep(trial.sleep_cycles)
            begin.record()
            trial.run(prepared)
            end.record()
    torch.cuda.synchronize(flushed.device)
    return [begin.elapsed_time(end) / 1000 for begin, end in zip(begins, ends, strict=True)]


def _within(limits: tuple[int, int], number: float) -> int:
    return int(min(max(number, limits[0]), limits[1]))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
