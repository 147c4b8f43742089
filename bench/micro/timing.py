"""Times of several providers of one case, taken in turn, so that a machine's moods are shared by all.

A turn is some measured calls of one provider. Where calls are short, an unmeasured one comes first: it brings back the
caches and thread pools that the provider before left otherwise. Turns are drawn in random order, round after round.

On a CPU the clock is ``time.perf_counter`` around a call; what it works on may be in the caches, as it is in a
training step. On a GPU a pair of events surrounds each call, behind a write that empties the second-level cache; the
host issues calls without waiting, so that the time of issuing them is hidden as far as that write lasts. ``replay_seconds`` has
none of it.
"""

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch

from .workload import Trial

__all__ = ["copy_bandwidth", "measure", "peak_memory_bytes", "replay_seconds", "turn_on"]

CASE_SECONDS = 1.0
TURN_SECONDS = 0.005
ROUNDS = (5, 30)
CALLS = (1, 100)
REPLAYS = 100
FLUSHED_BYTES = 256 << 20  # several times any GPU's second-level cache
COPIED_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}

Turn = Callable[[Trial, int, bool], list[float]]
"""Seconds of so many calls, behind an unmeasured one if that is wanted."""


def turn_on(device: torch.device) -> Turn:
    """How a turn is timed on a device."""
    if device.type == "cuda":
        return partial(_gpu_turn, torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device))
    return _cpu_turn


def measure(trials: Mapping[str, Trial], turn: Turn, repeats: int | None) -> dict[str, list[float]]:
    """Seconds of every measured call; ``repeats`` of them, or as many as fit into about a second a case."""
    seconds: dict[str, list[float]] = {name: [] for name in trials}
    with _no_garbage_collection():
        # the least of three: a call that another process interrupted would pass for a long one
        estimates = {name: min(turn(trial, 3, True)) for name, trial in trials.items()}
        calls, rounds = dict.fromkeys(trials, 1), repeats
        if rounds is None:
            calls = {name: _within(CALLS, TURN_SECONDS / estimate) for name, estimate in estimates.items()}
            rounds = _within(ROUNDS, CASE_SECONDS / (sum(estimate * calls[name] for name, estimate in estimates.items()) or 1))
        shuffle, order = random.Random(0).shuffle, list(trials)
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                seconds[name] += turn(trials[name], calls[name], estimates[name] < TURN_SECONDS)
    return seconds


def replay_seconds(trial: Trial, turn: Turn, device: torch.device, repeats: int | None) -> list[float]:
    """Seconds of replaying a CUDA graph of one call; none where it cannot be captured."""
    if device.type != "cuda" or not trial.capturable:
        return []
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    with trial.context():
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                trial.run(trial.prepare())
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph, stream=stream):
            kept = trial.run(trial.prepare())
    replay = Trial(lambda _: graph.replay(), dict, trial.context)
    seconds = turn(replay, repeats or REPLAYS, True)
    del kept
    return seconds


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


def _gpu_turn(flushed: torch.Tensor, trial: Trial, calls: int, settle: bool) -> list[float]:
    begins, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(calls)] for _ in range(2))
    with trial.context():
        if settle:
            trial.run(trial.prepare())
        for begin, end in zip(begins, ends, strict=True):
            prepared = trial.prepare()
            flushed.zero_()
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
