import subprocess
import sys

import pytest
import torch

from dfkd_fast import Loop, Method, Trainer
from dfkd_fast.engine import trainer as trainers
from dfkd_fast.engine.device import Clock, cudnn_benchmark, peak_memory_bytes
from tests.small import small_networks

ASK = "import torch; from dfkd_fast.engine.device import peak_memory_bytes; print(peak_memory_bytes(torch.device('cpu')))"
GIB = 1 << 30


def childs_peak() -> int:
    return int(subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True).stdout)


def test_the_peak_is_of_this_process_and_not_of_the_one_that_started_it() -> None:
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


FREE = """
import sys, torch
from pathlib import Path
from dfkd_fast.engine.device import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
before = resident()
large = torch.ones(1 << 28, dtype=torch.uint8)
del large
print(resident() - before)
"""


@pytest.mark.parametrize(("how", "kept"), [("leave", False), ("keep", True)])
def test_freed_memory_stays_with_a_process_that_asked_for_it(how: str, kept: bool) -> None:
    done = subprocess.run([sys.executable, "-c", FREE, how], capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 1 << 27) is kept


@pytest.mark.parametrize("keep_memory", [True, False])
def test_a_trainer_on_a_cpu_keeps_memory_unless_told_not_to(keep_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(trainers, "keep_freed_memory", lambda: asked.append(True))
    Trainer(*small_networks(), Method(loop=Loop(batch_size=2, keep_memory=keep_memory)))
    assert asked == [True] * keep_memory


@pytest.mark.parametrize("name", ["cpu", "cuda"])
@pytest.mark.parametrize("told", ["nothing", "cudnn.deterministic", "deterministic algorithms"])
def test_cudnn_tries_its_algorithms_on_a_gpu_unless_told_to_be_deterministic(monkeypatch: pytest.MonkeyPatch, name: str, told: str) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", told == "cudnn.deterministic")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: told == "deterministic algorithms")
    before = torch.backends.cudnn.benchmark
    with pytest.raises(RuntimeError, match="a step"), cudnn_benchmark(torch.device(name)):
        assert torch.backends.cudnn.benchmark is (name == "cuda" and told == "nothing")
        raise RuntimeError("a step")
    assert torch.backends.cudnn.benchmark is before


def test_the_clock_reads_the_gpu_it_was_given_and_not_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    given = torch.device("cuda", 1)
    asked: dict[str, object] = {}

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object = "the current device's") -> None:
            asked["record"] = stream

        def elapsed_time(self, end: "Event") -> float:
            return 1000.0

    def note(name: str, result: object = None) -> None:
        def called(device: object = "the current one") -> object:
            asked[name] = device
            return device if result is None else result

        monkeypatch.setattr(torch.cuda, name, called)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("current_stream", "synchronize", "reset_peak_memory_stats"):
        note(name)
    note("max_memory_allocated", 7)
    clock = Clock(given)
    with clock.phase("student"):
        pass
    assert clock.read() == {"student": 1.0}
    assert set(asked.values()) == {given}
