import subprocess
import sys

import pytest
import torch

from dfkd_fast import Engine, Loop, Method, Trainer
from dfkd_fast.engine import prepare as preparing
from dfkd_fast.engine.clock import Clock, peak_memory_bytes
from dfkd_fast.engine.device import benchmark_convolutions
from tests.small import small_method, small_networks

ASK = "import torch; from dfkd_fast.engine.clock import peak_memory_bytes; print(peak_memory_bytes(torch.device('cpu')))"
GIB = 1 << 30


def childs_peak() -> int:
    return int(subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True).stdout)


def test_the_peak_is_that_of_this_process_and_not_of_its_parent() -> None:
    alone = childs_peak()
    ballast = torch.ones(GIB, dtype=torch.uint8)
    assert peak_memory_bytes(torch.device("cpu")) > GIB
    assert abs(childs_peak() - alone) < GIB / 4
    del ballast


def test_the_peak_stays_when_memory_is_given_back() -> None:
    ballast = torch.ones(GIB // 2, dtype=torch.uint8)
    peak = peak_memory_bytes(torch.device("cpu"))
    del ballast
    assert peak_memory_bytes(torch.device("cpu")) >= peak > GIB // 2


FREE_MEMORY_SCRIPT = """
import sys, torch
from pathlib import Path
from dfkd_fast.engine.device import reuse_freed_memory
if sys.argv[1] == "keep":
    reuse_freed_memory()
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
before = resident()
large = torch.ones(1 << 28, dtype=torch.uint8)
del large
print(resident() - before)
"""


@pytest.mark.parametrize(("how", "kept"), [("leave", False), ("keep", True)])
def test_freed_memory_is_kept_by_a_process_with_malloc_reuse(how: str, kept: bool) -> None:
    done = subprocess.run([sys.executable, "-c", FREE_MEMORY_SCRIPT, how], capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 1 << 27) is kept


@pytest.mark.parametrize("malloc_reuse", [True, False])
def test_a_trainer_on_a_cpu_reuses_freed_memory_unless_disabled(malloc_reuse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(preparing, "reuse_freed_memory", lambda: asked.append(True))
    Trainer(*small_networks(), Method(loop=Loop(batch_size=2), engine=Engine(malloc_reuse=malloc_reuse)))
    assert asked == [True] * malloc_reuse


@pytest.mark.parametrize("name", ["cpu", "cuda"])
@pytest.mark.parametrize("requested", ["nothing", "cudnn.deterministic", "deterministic algorithms"])
def test_cudnn_benchmark_is_enabled_on_a_gpu_unless_deterministic_algorithms_are_requested(
    monkeypatch: pytest.MonkeyPatch, name: str, requested: str
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", requested == "cudnn.deterministic")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: requested == "deterministic algorithms")
    before = torch.backends.cudnn.benchmark
    with pytest.raises(RuntimeError, match="a step"), benchmark_convolutions(torch.device(name)):
        assert torch.backends.cudnn.benchmark is (name == "cuda" and requested == "nothing")
        raise RuntimeError("a step")
    assert torch.backends.cudnn.benchmark is before


class Allocator:
    """Fake of PyTorch's GPU memory statistics that records the devices it is called with."""

    def __init__(self) -> None:
        self.held = self.peak = self.asked = 0
        self.devices: set[object] = set()

    def hold(self, held: int) -> None:
        self.held, self.peak = held, max(self.peak, held)

    def max_memory_allocated(self, device: object = "the current one") -> int:
        self.devices.add(device)
        self.asked += 1
        return self.peak

    def reset_peak_memory_stats(self, device: object = "the current one") -> None:
        self.devices.add(device)
        self.peak = self.held


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    """Fixture with a fake allocator, and fake CUDA streams and events."""

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object = "the current one's") -> None:
            stand_in.devices.add(stream)

        def elapsed_time(self, _: "Event") -> float:
            return 1.0

    stand_in = Allocator()
    for name in ("max_memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, getattr(stand_in, name))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device="the current one's": device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device="the current one": stand_in.devices.add(device))
    return stand_in


def test_the_clock_reads_its_gpu_and_not_the_current_one(allocator: Allocator) -> None:
    clock = Clock(torch.device("cuda", 1))
    with clock.phase("student"):
        pass
    assert clock.read() == {"student": 1e-3}
    assert allocator.devices == {torch.device("cuda", 1)}


def test_memory_statistics_are_queried_a_few_times_per_epoch_and_not_in_every_phase(allocator: Allocator) -> None:
    asked = []
    for iterations in (2, 5):
        trainer = Trainer(*small_networks(), small_method(epochs=2, iterations=iterations, batch_size=2))
        trainer.state.clock = Clock(torch.device("cuda"))
        allocator.asked = 0
        trainer.fit()
        asked.append(allocator.asked)
        assert set(trainer.state.clock.peak_bytes) == {"student", "generator", "evaluation"}
        assert trainer.state.clock.read() == pytest.approx(
            {"student": iterations * 2e-3, "generator": iterations * 2e-3, "evaluation": 2e-3}
        )
    assert asked[0] == asked[1] == 2 * 3 * 2  # before and after three phases of two epochs


def test_peaks_are_those_of_measured_phases_and_overall_those_of_all(allocator: Allocator) -> None:
    clock = Clock(torch.device("cuda"))
    allocator.hold(10)
    allocator.hold(1)
    assert clock.overall_peak_bytes() == 10

    def phase(name: str, most: int, *, memory: bool = True) -> None:
        with clock.phase(name, memory=memory):
            allocator.hold(most)
            allocator.hold(1)

    phase("student", 5, memory=False)  # measured the first time
    phase("generator", 7)
    assert clock.peak_bytes == {"student": 5, "generator": 7}
    assert clock.overall_peak_bytes() == 10, "of the time before"
    phase("student", 30, memory=False)
    allocator.hold(40)  # between phases
    allocator.hold(1)
    phase("generator", 6)
    assert clock.peak_bytes == {"student": 5, "generator": 7}
    assert clock.overall_peak_bytes() == 40
    phase("student", 8)
    assert clock.peak_bytes == {"student": 8, "generator": 7}
    assert clock.overall_peak_bytes() == 40
