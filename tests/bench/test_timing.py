"""What the micro-benchmarks time on a GPU, with a simulated one: a queue of work, and a host that fills it."""

import gc
import statistics
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from bench.micro import timing
from bench.micro.workload import Trial

CUDA = torch.device("cuda")
ISSUE, FLUSH, CYCLE, REPLAY = (
    5e-6,
    70e-6,
    0.6e-9,
    15e-6,
)  # seconds: host per launch, device per flush, device per sleep cycle, host per replay


class Gpu:
    """Simulated clocks of the host and of the device, which runs the submitted work in order."""

    def __init__(self) -> None:
        self.now = self.free_at = 0.0
        self.stream = "usual"
        self.mode = "default"
        self.capturing: list[float] | None = None

    def issue(self, device: float, host: float = ISSUE) -> None:
        self.now += host
        if self.capturing is not None:
            self.capturing.append(device)
        else:
            self.free_at = max(self.now, self.free_at) + device

    def synchronize(self, _: object = None) -> None:
        if self.mode == "error" or self.capturing is not None:
            raise RuntimeError("called a synchronizing CUDA operation\nmore")
        self.now = max(self.now, self.free_at)

    @contextmanager
    def on_stream(self, stream: str) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def capture(self, graph: "Graph", stream: str) -> Iterator[None]:
        assert self.stream == stream
        self.capturing = graph.work
        try:
            yield
        finally:
            self.capturing = None


class Graph:
    gpu: Gpu

    def __init__(self) -> None:
        self.work: list[float] = []

    def replay(self) -> None:
        self.gpu.issue(sum(self.work), REPLAY)


class Event:
    gpu: Gpu

    def __init__(self, *, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.gpu.issue(0.0)
        self.at = self.gpu.free_at

    def query(self) -> bool:
        return self.gpu.now >= self.at

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.at - self.at)


class Side:
    def __init__(self, _: object) -> None:
        pass

    def wait_stream(self, _: object) -> None:
        pass


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    stand_in = Gpu()
    monkeypatch.setattr(Graph, "gpu", stand_in, raising=False)
    monkeypatch.setattr(Event, "gpu", stand_in, raising=False)
    calls: dict[str, Any] = {
        "Event": Event,
        "CUDAGraph": Graph,
        "Stream": Side,
        "current_stream": lambda _: stand_in.stream,
        "stream": stand_in.on_stream,
        "graph": stand_in.capture,
        "synchronize": stand_in.synchronize,
        "_sleep": lambda cycles: stand_in.issue(cycles * CYCLE),
        "get_sync_debug_mode": lambda: stand_in.mode,
        "set_sync_debug_mode": lambda mode: setattr(stand_in, "mode", mode),
    }
    for name, call in calls.items():
        monkeypatch.setattr(torch.cuda, name, call)
    return stand_in


class Flushed:
    """A buffer as large as the caches."""

    device = CUDA

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def zero_(self) -> None:
        self.gpu.issue(FLUSH)


class Result:
    """Return value of a call."""


def trial(run: Callable[[], object], *, capturable: bool) -> Trial:
    return Trial(lambda _: run(), dict, nullcontext, capturable=capturable)


def microseconds(gpu: Gpu, ready: timing.Ready) -> float:
    seconds = timing.measure({"it": ready.trial}, lambda *turn: timing._time_on_gpu(Flushed(gpu), *turn), 9)["it"]  # type: ignore[arg-type]
    return 1e6 * statistics.median(seconds)


@pytest.mark.parametrize("kernels", [1, 9])
@pytest.mark.parametrize("host", [20e-6, 500e-6, 6e-3])
@pytest.mark.parametrize(("capturable", "timed"), [(True, "graph replay"), (False, "behind a sleep")])
def test_the_time_of_a_call_is_the_device_s_independent_of_the_host(
    gpu: Gpu, kernels: int, host: float, capturable: bool, timed: str
) -> None:
    def call() -> None:
        for _ in range(kernels):
            gpu.issue(30e-6, host / kernels)

    ready = timing.ready(trial(call, capturable=capturable), CUDA)
    assert ready.timed == timed
    assert microseconds(gpu, ready) == pytest.approx(kernels * 30)


def test_host_time_that_cannot_be_hidden_is_reported(gpu: Gpu) -> None:
    def call() -> None:
        gpu.issue(30e-6)
        gpu.synchronize()
        gpu.issue(30e-6, 200e-6)

    ready = timing.ready(trial(call, capturable=False), CUDA)
    assert ready.timed == "with the host's time, which no sleep hides"
    assert microseconds(gpu, ready) > 60 + 200


def test_a_call_that_synchronizes_is_not_captured_and_the_state_is_restored(gpu: Gpu) -> None:
    captured: list[bool] = []

    def call() -> None:
        captured.append(gpu.capturing is not None)
        gpu.issue(30e-6)
        gpu.synchronize()

    ready = timing.ready(trial(call, capturable=True), CUDA)
    assert ready.timed == "with the host's time, which no sleep hides"
    assert not any(captured), "detected before a capture, which it would break"
    assert (gpu.stream, gpu.mode) == ("usual", "default")


def test_a_call_that_cannot_be_captured_is_timed_behind_a_sleep_with_the_reason(gpu: Gpu) -> None:
    def call() -> None:
        if gpu.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        gpu.issue(30e-6, 300e-6)

    ready = timing.ready(trial(call, capturable=True), CUDA)
    assert ready.timed == "behind a sleep, capture failed: operation not permitted when stream is capturing"
    assert microseconds(gpu, ready) == pytest.approx(30)
    assert gpu.stream == "usual"


def test_the_outputs_of_a_replay_are_kept_alive(gpu: Gpu) -> None:
    made: list[weakref.ref[Result]] = []

    def call() -> Result:
        result = Result()
        made.append(weakref.ref(result))
        return result

    ready = timing.ready(trial(call, capturable=True), CUDA)
    gc.collect()
    assert [result() is not None for result in made] == [False] * (len(made) - 1) + [True]
    assert ready.timed == "graph replay"


def test_on_a_cpu_a_call_is_timed_by_wall_clock() -> None:
    unchanged = trial(lambda: None, capturable=True)
    assert timing.ready(unchanged, torch.device("cpu")) == (unchanged, "wall clock")
