import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch._C._autograd import DeviceType
from torch._dynamo.utils import counters

from bench import end_to_end, methods, provenance, report, table
from bench.__main__ import main
from bench.baselines.plain import textbook
from bench.end_to_end import Row, contenders, measuring, rows
from bench.processes import WorkerError
from bench.provenance import measured_on
from dfkd_fast import DfkdError, GeneratorA, Recipe, load_recipe
from dfkd_fast.engine.clock import Clock

CPU = torch.device("cpu")


def tiny(**changes: object) -> Recipe:
    small = {"loop.batch_size": 4, "generator.width": 4, "loop.student_steps": 1}
    return load_recipe("digits", small | {name.replace("__", "."): value for name, value in changes.items()})


def row(contender: str, seconds: float) -> Row:
    text = {"recipe": "r", "precision": "fp32", "contender": contender}
    figures = {name: seconds for name in Row.__annotations__ if name not in (*text, "provenance")}
    return Row(**text, **figures | {"batch_size": 4}, provenance=measured_on("d", ""))  # type: ignore[arg-type]


def test_the_textbook_generator_is_the_same_function_with_the_same_parameters() -> None:
    ours = GeneratorA(5, 3, 16, width=4).double().eval()
    other = textbook(copy.deepcopy(ours))
    z = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(other(z), ours(z))
    assert other.state_dict().keys() == ours.state_dict().keys()
    assert [type(layer) for layer in other.modules()] != [type(layer) for layer in ours.modules()]


@pytest.mark.parametrize("replay", ["none", "ema_generator"])
def test_every_uncompiled_contender_plays_whole_iterations_and_says_how_long(replay: str) -> None:
    builds = contenders.contenders(tiny(replay__kind=replay), CPU, "bf16", compiled_engine=True)
    assert list(builds)[:2] == ["plain", "plain_compiled"]
    assert list(builds)[-2:] == ["engine", "engine, compiled"]
    for name, build in builds.items():
        if "compiled" not in name:
            times = build().run(2)
            assert len(times) == 2, name
            assert all(0 < student < whole for student, whole in times), name


def test_the_features_are_switched_on_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, object]] = []
    monkeypatch.setattr(contenders, "_engine", lambda recipe, device, changes: seen.append(changes))
    for name, build in contenders.contenders(tiny(), CPU, "bf16", compiled_engine=True, graphs=True).items():
        if not name.startswith("plain"):
            build()
    differences = [{key for key in seen[-1] if before.get(key) != after.get(key)} for before, after in itertools.pairwise(seen)]
    assert differences == [
        {"engine.channels_last"},
        {"engine.cpu_convolutions"},
        {"engine.malloc_reuse"},
        {"textbook"},
        {"kernels"},
        {"engine.fold_teacher"},
        {"engine.precision"},
        {"engine.capture"},
        {"engine.compile"},
    ]
    names = list(contenders.contenders(tiny(), CPU, "bf16", graphs=True))
    assert names[-3:] == ["+ folded teacher", "engine, eager", "engine"]


def test_the_memory_of_an_iteration_is_at_least_that_of_its_student_steps() -> None:
    recipe = tiny(generator__width=32)
    for name in ("plain", "engine"):
        memory = measuring._memory_alone(partial(contenders.build, recipe, CPU, "fp32", name), CPU)
        assert memory.student_steps is not None
        assert 0 <= memory.student_steps <= memory.iteration < 1000
        assert memory.iteration < memory.reserved


def test_a_contender_is_timed_for_some_turns_in_a_process_of_its_own() -> None:
    starts, times = measuring._in_turns({"plain": partial(contenders.build, tiny(), CPU, "fp32", "plain")}, CPU, turns=2)
    assert starts == {"plain": measuring.Start("fp32", "", False, "")}
    assert len(times["plain"]) == 2
    assert all(0 < student < whole for student, whole in times["plain"])
    assert not measuring._contender


def test_every_call_of_the_compiled_peer_is_compiled_and_it_takes_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        def run(*arguments: torch.Tensor) -> Any:
            runs.append(1)
            return graph.forward(*arguments)

        return run

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    counters.clear()
    parameters = []
    for compiled in (False, True):
        contender = contenders._plain(tiny(replay__kind="ema_generator"), CPU, "fp32", compiled=compiled)
        torch.manual_seed(0)
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            contender.run(3)
        parameters.append(contender.student_optimizer.param_groups[0]["params"])
    assert len(runs) == 3 * (4 + 3), "generator, averaged generator, student, teacher; generator, student, teacher"
    assert not counters["graph_break"]
    for ours, theirs in zip(*parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    torch._dynamo.reset()


class FakeAllocator:
    """PyTorch's, in MiB: what is freed stays reserved until the cache is emptied, but for the pools of graphs."""

    def __init__(self, patched: pytest.MonkeyPatch, held: int, pool: int) -> None:
        self.held, self.pool, self.cached = held, pool, 0
        self.peak_allocated = self.peak_reserved = held + pool
        for name, value in {
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: setattr(self, "cached", 0),
            "reset_peak_memory_stats": lambda device=None: self.reset(),
            "memory_allocated": lambda device=None: self.held << 20,
            "max_memory_allocated": lambda device=None: self.peak_allocated << 20,
            "max_memory_reserved": lambda device=None: self.peak_reserved << 20,
        }.items():
            patched.setattr(torch.cuda, name, value)

    def reset(self) -> None:
        self.peak_allocated, self.peak_reserved = self.held, self.held + self.pool + self.cached

    def take(self, size: int) -> None:
        """Allocate and free again."""
        self.cached = max(self.cached, size)
        self.peak_allocated = max(self.peak_allocated, self.held + size)
        self.peak_reserved = max(self.peak_reserved, self.held + self.pool + self.cached)


@pytest.mark.parametrize("replayed", [False, True])
def test_the_memory_of_an_iteration_on_a_gpu_counts_that_of_replayed_graphs(monkeypatch: pytest.MonkeyPatch, replayed: bool) -> None:
    allocator = FakeAllocator(monkeypatch, held=100, pool=450 if replayed else 0)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])

    def run(_: int) -> list[tuple[float, float]]:
        if not replayed:
            allocator.take(300)
            optimizer.step()
            allocator.reset()  # as the engine's clock does between its phases
            allocator.take(500)
        return []

    allocator.take(2000)  # of a warm-up
    monkeypatch.setattr(measuring, "_contender", [contenders.Contender(run, optimizer)])
    found = measuring.memory(torch.device("cuda"))
    assert (found.iteration, found.student_steps) == ((450.0, None) if replayed else (500.0, 300.0))
    assert found.reserved == (550.0 if replayed else 600.0)


def test_on_a_gpu_contenders_are_alone_and_one_that_fails_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "device_name", lambda device: "a GPU")
    names = list(contenders.contenders(tiny(), torch.device("cuda"), "bf16"))
    alone: list[str] = []

    def measure(build: Callable[[], Any], device: torch.device, turns: int) -> Any:
        alone.append(names[len(alone)])
        if alone[-1] == "plain_compiled":
            raise WorkerError("RuntimeError: out of memory")
        memory = rows.Memory(5.0, None, 6.0, 7.0)
        return measuring.Start("bf16", "convolutions", False, ""), [(1.0, 8.0 / len(alone))] * turns, memory

    monkeypatch.setattr(measuring, "_alone", measure)
    failures: list[str] = []
    found = list(end_to_end.measure(tiny(), torch.device("cuda"), "bf16", 3, "", failed=failures.append))
    assert alone == names
    assert failures == ["plain_compiled: RuntimeError: out of memory"]
    assert [len(rows) for rows in found] == list(range(1, len(alone)))
    assert [row.contender for row in found[-1]] == [name for name in alone if name != "plain_compiled"]
    assert {row.speedup_over_plain_compiled for row in found[-1]} == {None}
    assert found[-1][1].speedup_over_plain == 3.0


def test_a_contender_that_is_not_captured_as_it_should_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_contender", [])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])

    def build() -> contenders.Contender:
        return contenders.Contender(lambda _: [], optimizer, notes=["the student step: no"], captured=True, holds=lambda: False)

    with pytest.raises(DfkdError, match=r"^the student step: no$"):
        measuring.begin(build, CPU)


def test_tf32_is_named_where_a_contender_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch._C, "_get_cublas_allow_tf32", lambda: False)
    gpu = torch.device("cuda")
    assert [measuring._tf32(gpu, autocast) for autocast in ("fp32", "bf16")] == ["convolutions", "nowhere"]
    monkeypatch.setattr(torch._C, "_get_cublas_allow_tf32", lambda: True)
    assert [measuring._tf32(gpu, autocast) for autocast in ("fp32", "bf16")] == ["convolutions, matrix products", "matrix products"]
    assert measuring._tf32(CPU, "fp32") == ""


def test_short_iterations_are_timed_more_often_than_long_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def run(seconds: float, iterations: int) -> list[tuple[float, float]]:
        counts.append(iterations)
        return [(0.0, seconds)] * iterations

    for seconds in (1e-9, 0.1, 10.0):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
        monkeypatch.setattr(measuring, "_contender", [contenders.Contender(partial(run, seconds), optimizer)])
        measuring.time_for(2.0, fewest=3)
    assert counts == [1, measuring.MOST, 1, 20, 1, 3]


class FakeProfiler:
    """torch.profiler's, of two iterations on a GPU."""

    def __init__(self, activities: list[Any]) -> None:
        self.activities = activities

    def __enter__(self) -> "FakeProfiler":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def key_averages(self) -> list[SimpleNamespace]:
        def event(key: str, device: DeviceType, count: int, us: float, annotation: bool = False) -> SimpleNamespace:
            return SimpleNamespace(
                key=key, device_type=device, count=count, self_device_time_total=us, self_cpu_time_total=1e9, is_user_annotation=annotation
            )

        return [
            event("cheap", DeviceType.CUDA, 8, 20.0),
            event("dear", DeviceType.CUDA, 2, 60.0),
            event("Memset (Device)", DeviceType.CUDA, 2, 1.0),
            event("Optimizer.step#SGD.step", DeviceType.CUDA, 2, 500.0, annotation=True),
            event("cudaLaunchKernel", DeviceType.CPU, 10, 0.0),
        ]


def test_kernels_are_what_the_gpu_ran_without_the_hosts_calls_and_annotated_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "profile", FakeProfiler)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    monkeypatch.setattr(measuring, "_contender", [contenders.Contender(lambda _: [], optimizer)])
    found = measuring.kernels(torch.device("cuda"), iterations=2, count=2)
    assert found.calls_per_iteration == 6.0
    assert found.seconds_per_iteration == pytest.approx(40.5e-6)
    assert [(one.name, one.calls_per_iteration, one.us_per_iteration) for one in found.most_expensive] == [
        ("dear", 1.0, 30.0),
        ("cheap", 4.0, 10.0),
    ]
    assert [one.share for one in found.most_expensive] == [pytest.approx(60 / 81, abs=1e-4), pytest.approx(20 / 81, abs=1e-4)]
    monkeypatch.setattr(FakeProfiler, "key_averages", lambda self: [])
    with pytest.raises(DfkdError, match="no kernels"):
        measuring.kernels(torch.device("cuda"), iterations=2, count=2)


class FakeEvent:
    """Of a GPU whose clock goes on by a second with every event, and whose work is done once it was waited for."""

    clock = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        FakeEvent.clock += 1
        self.at = FakeEvent.clock

    def elapsed_time(self, end: "FakeEvent") -> float:
        return 1000.0 * (end.at - self.at)


def test_marks_on_a_gpu_are_events_that_wait_at_the_end_only(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[object] = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    marks = contenders.Marks(torch.device("cuda"))
    for _ in range(3):
        marks.set()
    assert not waited
    assert marks.seconds() == [1.0, 1.0]
    assert len(waited) == 1
    assert marks.seconds() == []


def test_rows_are_in_the_file_when_a_later_contender_breaks_the_bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measure(*_: object, **__: object) -> Iterator[list[Row]]:
        rows = [replace(row("plain", 4.0), speedup_over_plain_compiled=None, peak_memory_mib=None, imitation_memory_mib=None)]
        yield rows
        yield [*rows, row("engine", 1.0)]
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(end_to_end, "measure", measure)
    monkeypatch.setattr("sys.argv", ["bench", "end-to-end", "--recipe", "digits", "--device", "cpu", "--out", str(tmp_path / "rows.csv")])
    with pytest.raises(RuntimeError, match="driver"):
        main()
    rows = table.read(tmp_path / "rows.csv")
    assert [found["contender"] for found in rows] == ["plain", "engine"]
    # What is missing is left out of the picture and of the table.
    end_to_end.draw(rows, tmp_path / "rows.png")
    assert "| plain | 4.000 | 4.00 |  |  |  | d |" in report.end_to_end_table(rows)


def test_what_the_plain_loop_does_not_know_is_refused() -> None:
    with pytest.raises(DfkdError, match="the plain loop knows"):
        contenders.check(load_recipe("digits-vae"))
    contenders.check(load_recipe("cifar10-mad"))


def test_rows_replace_those_of_their_own_case_only(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    end_to_end.write(path, [row("plain", 4.0), row("engine", 1.0)])
    end_to_end.write(path, [replace(row("plain", 8.0), precision="bf16")])
    end_to_end.write(path, [row("plain", 3.0)])
    assert [(found["precision"], found["contender"], float(found["seconds_per_iteration"])) for found in table.read(path)] == [
        ("bf16", "plain", 8.0),
        ("fp32", "plain", 3.0),
    ]


def test_the_picture_has_a_panel_a_case(tmp_path: Path) -> None:
    rows = [{name: str(value) for name, value in table.cells(row(name, 1.0)).items()} for name in ("plain", "engine")]
    end_to_end.draw(rows, tmp_path / "one.png")
    end_to_end.draw([*rows, *({**found, "precision": "bf16"} for found in rows)], tmp_path / "two.png")
    assert Image.open(tmp_path / "two.png").height > Image.open(tmp_path / "one.png").height


def test_the_memory_of_a_method_is_its_trainers_whole_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clock, "overall_peak_bytes", lambda clock: 12345)
    assert methods._peak_memory("digits-dfad", "cpu", 1) == 12345


def test_the_cost_of_a_method_is_relative_to_the_first() -> None:
    rows = methods.measure(["digits-dfad", "digits-bank"], CPU, 1, "")
    assert [found.recipe for found in rows] == ["digits-dfad", "digits-bank"]
    assert (rows[0].times_first, rows[0].memory_over_first_mib) == (1.0, 0.0)
    assert [found.fresh_rows + found.replayed_rows for found in rows] == [64, 64]
    assert all(found.iteration_ms > 0 and found.peak_memory_mib > 50 for found in rows)
