import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._C._autograd import DeviceType
from torch._dynamo.utils import counters

from bench import end_to_end, methods, provenance, report, table
from bench.__main__ import main
from bench.baselines.plain import textbook
from bench.end_to_end import Row, contenders, measuring, plots, rows
from bench.processes import Worker, WorkerError
from bench.provenance import measured_on
from dfkd_fast import DfkdError, GeneratorA, Recipe, load_recipe
from dfkd_fast.engine.clock import Clock

CPU = torch.device("cpu")
ON_GPU = torch.device("cuda")
PEERS = ["plain", "plain + malloc reuse", "plain compiled", "plain compiled + malloc reuse"]


def tiny(**changes: object) -> Recipe:
    small = {"loop.batch_size": 4, "generator.width": 4, "loop.student_steps": 1}
    return load_recipe("digits", small | {name.replace("__", "."): value for name, value in changes.items()})


def row(contender: str, seconds: float) -> Row:
    text = {"recipe": "r", "precision": "fp32", "contender": contender}
    values = {name: seconds for name in Row.__annotations__ if name not in (*text, "provenance")}
    return Row(**text, **values | {"batch_size": 4}, provenance=measured_on("d", ""))  # type: ignore[arg-type]


def test_the_textbook_generator_is_the_same_function_with_the_same_parameters() -> None:
    ours = GeneratorA(5, 3, 16, width=4).double().eval()
    other = textbook(copy.deepcopy(ours))
    z = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(other(z), ours(z))
    assert other.state_dict().keys() == ours.state_dict().keys()
    assert [type(layer) for layer in other.modules()] != [type(layer) for layer in ours.modules()]


@pytest.mark.parametrize("replay", ["none", "ema_generator"])
def test_every_uncompiled_contender_runs_and_times_whole_iterations(replay: str) -> None:
    for name, build in contenders.contenders(tiny(replay__kind=replay), CPU, "bf16", compiled_engine=True).items():
        if "compile" not in name:
            times = build().run(2)
            assert len(times) == 2, name
            assert all(0 < student < whole for student, whole in times), name


def test_on_a_cpu_each_plain_loop_is_a_peer_with_and_without_malloc_reuse() -> None:
    names = list(contenders.contenders(tiny(), CPU, "bf16"))
    assert names[:4] == PEERS
    assert names[4:] == [
        "+ no redundant gradients",
        "+ channels-last",
        "+ CPU convolution selection",
        "+ malloc reuse",
        "+ transposed convolution",
        "+ fused kernels",
        "+ folded teacher",
        "engine (+ bf16 autocast)",
    ]
    assert list(contenders.contenders(tiny(), CPU, "fp32"))[-2:] == ["+ fused kernels", "engine (+ folded teacher)"]


def test_on_a_gpu_no_contender_has_malloc_reuse_and_cuda_graphs_come_last() -> None:
    assert list(contenders.contenders(tiny(), ON_GPU, "bf16", compiled_engine=True)) == [
        "plain",
        "plain compiled",
        "+ no redundant gradients",
        "+ channels-last",
        "+ transposed convolution",
        "+ fused kernels",
        "+ folded teacher",
        "+ fused teacher",
        "+ bf16 autocast",
        "engine (+ CUDA graphs)",
        "engine, compiled teacher",
        "engine, compiled student",
        "engine, compiled generator",
        "+ torch.compile",
    ]


def test_each_rung_enables_the_feature_in_its_name_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    rungs: dict[str, dict[str, object]] = {}
    monkeypatch.setattr(contenders, "_engine", lambda recipe, device, changes: changes)
    on_cpu, on_gpu = (contenders.contenders(tiny(), device, "bf16", compiled_engine=True, graphs=True) for device in (CPU, ON_GPU))
    builders: dict[str, Callable[[], Any]] = dict(on_cpu)
    for name, build in builders.items():
        if name not in PEERS:
            rungs[name] = build()
    before: dict[str, object] = rungs.pop("+ no redundant gradients")
    assert set(before.values()) == {True, False, "fp32"}
    assert [name for name, value in before.items() if value is True] == ["textbook"]
    enabled = {}
    for name, changes in rungs.items():
        enabled[name] = {key: value for key, value in changes.items() if before.get(key) != value}
        before = changes
    fused, folded = (on_gpu[name]() for name in ("+ fused teacher", "+ folded teacher"))
    assert fused == folded | {"engine.fuse_teacher": True}  # type: ignore[operator]
    assert enabled == {
        "+ channels-last": {"engine.channels_last": True},
        "+ CPU convolution selection": {"engine.cpu_convolutions": True},
        "+ malloc reuse": {"engine.malloc_reuse": True},
        "+ transposed convolution": {"textbook": False},
        "+ fused kernels": {"kernels": True},
        "+ folded teacher": {"engine.fold_teacher": True},
        "+ bf16 autocast": {"engine.precision": "bf16"},
        "engine (+ CUDA graphs)": {"engine.capture": True},
        "engine, compiled teacher": {"engine.compile": ("teacher",)},
        "engine, compiled student": {"engine.compile": ("student",)},
        "engine, compiled generator": {"engine.compile": ("generator",)},
        "+ torch.compile": {"engine.compile": True},
    }


def test_the_compiled_peers_differ_from_the_eager_ones_in_compilation_and_precision_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "_plain", lambda recipe, device, precision, **options: (precision, options))
    builders: dict[str, Callable[[], Any]] = dict(contenders.contenders(tiny(), CPU, "bf16"))
    assert {name: builders[name]() for name in PEERS} == {
        "plain": ("fp32", {"compiled": False, "malloc_reuse": False}),
        "plain + malloc reuse": ("fp32", {"compiled": False, "malloc_reuse": True}),
        "plain compiled": ("bf16", {"compiled": True, "malloc_reuse": False}),
        "plain compiled + malloc reuse": ("bf16", {"compiled": True, "malloc_reuse": True}),
    }


def resident_mib() -> float:
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def freed_mib_that_stay_resident(name: str, malloc_reuse: bool) -> float:
    """Build a contender, then allocate and free 256 MiB, which glibc returns to the system unless malloc reuse is on."""
    contenders.build(tiny(), CPU, "bf16", name, malloc_reuse=malloc_reuse)
    before = resident_mib()
    torch.ones(64 << 20)
    return resident_mib() - before


def forked_mib_that_stay_resident(name: str) -> float:
    """Like freed_mib_that_stay_resident with malloc reuse, in a fork of this process, because malloc's settings cannot be undone."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        try:
            os.write(writing, str(freed_mib_that_stay_resident(name, True)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        result = pipe.read()
    os.waitpid(child, 0)
    return float(result)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the resident memory from /proc")
def test_malloc_reuse_is_on_in_the_process_of_every_contender_that_has_it_and_of_no_other() -> None:
    off = [("plain", True), ("plain compiled", True), ("+ CPU convolution selection", True), ("engine (+ bf16 autocast)", False)]
    on = ["plain + malloc reuse", "plain compiled + malloc reuse", "+ malloc reuse", "engine (+ bf16 autocast)"]
    with Worker() as worker:  # imports once what every contender needs
        for name in on:  # before the worker builds a contender: after a backward pass it could not be forked on a machine with a GPU
            assert worker.call(forked_mib_that_stay_resident, name) > 128, name
        for name, malloc_reuse in off:  # they share a process, whose malloc none of them changes
            assert worker.call(freed_mib_that_stay_resident, name, malloc_reuse) < 128, name


def test_the_memory_of_an_iteration_is_at_least_that_of_its_student_steps() -> None:
    recipe = tiny(generator__width=32)
    for name in ("plain", "engine (+ folded teacher)"):
        memory = measuring._memory_alone(partial(contenders.build, recipe, CPU, "fp32", name), CPU)
        assert memory.student_steps is not None
        assert 0 <= memory.student_steps <= memory.iteration < 1000
        assert memory.iteration < memory.reserved


def test_a_contender_is_timed_in_its_own_process() -> None:
    starts, times = measuring._interleaved({"plain": partial(contenders.build, tiny(), CPU, "fp32", "plain")}, CPU, turns=2)
    seconds = starts["plain"].warm_up_seconds
    assert starts == {"plain": measuring.Start("fp32", "", False, "", seconds)}
    assert seconds > 0
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
    """PyTorch's caching allocator, in MiB: freed memory stays reserved until the cache is emptied, pools of CUDA graphs even longer."""

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
    peak = measuring.memory(ON_GPU)
    assert (peak.iteration, peak.student_steps) == ((450.0, None) if replayed else (500.0, 300.0))
    assert peak.reserved == (550.0 if replayed else 600.0)


def test_on_a_gpu_contenders_run_alone_and_a_failure_does_not_affect_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "device_name", lambda device: "a GPU")
    names = list(contenders.contenders(tiny(), ON_GPU, "bf16"))
    started: list[str] = []

    def measure(build: Callable[[], Any], device: torch.device, turns: int) -> Any:
        started.append(names[len(started)])
        if started[-1] == "plain compiled":
            raise WorkerError("RuntimeError: out of memory")
        memory = rows.Memory(5.0, None, 6.0, 7.0)
        return measuring.Start("bf16", "convolutions", False, "", 9.0), [(1.0, 8.0 / len(started))] * turns, memory

    monkeypatch.setattr(measuring, "_alone", measure)
    failures: list[str] = []
    measured = list(end_to_end.measure(tiny(), ON_GPU, "bf16", 3, "", on_failure=failures.append))
    assert started == names
    assert failures == ["plain compiled: RuntimeError: out of memory"]
    assert [len(rows) for rows in measured] == list(range(1, len(started)))
    assert [row.contender for row in measured[-1]] == [name for name in started if name != "plain compiled"]
    assert {(row.speedup_over_plain_compiled, row.speedup_over_plain_compiled_malloc_reuse) for row in measured[-1]} == {(None, None)}
    assert measured[-1][1].speedup_over_plain == 3.0


def test_speedups_are_medians_of_the_ratios_of_interleaved_iterations() -> None:
    seconds = {name: [(0.5, value), (0.5, 2 * value), (0.5, value)] for name, value in zip(PEERS, (8.0, 6.0, 4.0, 3.0), strict=True)}
    seconds["engine (+ folded teacher)"] = [(0.5, 1.0), (0.5, 1.0), (0.5, 2.0)]
    others = {"precision": "fp32", "provenance": measured_on("d", "")}
    engine = rows.row_of(tiny(), "engine (+ folded teacher)", seconds, None, interleaved=True, **others)
    speedups = engine.speedup_over_plain, engine.speedup_over_plain_compiled, engine.speedup_over_plain_compiled_malloc_reuse
    assert speedups == (8.0, 4.0, 3.0)


def test_a_contender_that_should_be_captured_and_is_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_contender", [])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])

    def build() -> contenders.Contender:
        return contenders.Contender(lambda _: [], optimizer, notes=["the student step: no"], captured=True, capture_succeeded=lambda: False)

    with pytest.raises(DfkdError, match=r"^the student step: no$"):
        measuring.begin(build, CPU)


def test_tf32_is_reported_for_the_operations_that_compute_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch._C, "_get_cublas_allow_tf32", lambda: False)
    assert [measuring._tf32(ON_GPU, autocast) for autocast in ("fp32", "bf16")] == ["convolutions", "nowhere"]
    monkeypatch.setattr(torch._C, "_get_cublas_allow_tf32", lambda: True)
    assert [measuring._tf32(ON_GPU, autocast) for autocast in ("fp32", "bf16")] == ["convolutions, matrix products", "matrix products"]
    assert measuring._tf32(CPU, "fp32") == ""


def test_short_iterations_are_timed_more_often_than_long_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def run(seconds: float, iterations: int) -> list[tuple[float, float]]:
        counts.append(iterations)
        return [(0.0, seconds)] * iterations

    for seconds in (1e-9, 0.1, 10.0):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
        monkeypatch.setattr(measuring, "_contender", [contenders.Contender(partial(run, seconds), optimizer)])
        measuring.time_for(2.0, minimum=3)
    assert counts == [1, measuring.MAX_TIMED, 1, 20, 1, 3]


class FakeProfiler:
    """torch.profiler's profile of two iterations on a GPU."""

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
            event("expensive", DeviceType.CUDA, 2, 60.0),
            event("Memset (Device)", DeviceType.CUDA, 2, 1.0),
            event("Optimizer.step#SGD.step", DeviceType.CUDA, 2, 500.0, annotation=True),
            event("cudaLaunchKernel", DeviceType.CPU, 10, 0.0),
        ]


def test_kernels_exclude_host_calls_and_annotated_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "profile", FakeProfiler)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    monkeypatch.setattr(measuring, "_contender", [contenders.Contender(lambda _: [], optimizer)])
    profile = measuring.kernels(ON_GPU, iterations=2, count=2)
    assert profile.calls_per_iteration == 6.0
    assert profile.seconds_per_iteration == pytest.approx(40.5e-6)
    assert [(one.name, one.calls_per_iteration, one.us_per_iteration) for one in profile.most_expensive] == [
        ("expensive", 1.0, 30.0),
        ("cheap", 4.0, 10.0),
    ]
    assert [one.share for one in profile.most_expensive] == [pytest.approx(60 / 81, abs=1e-4), pytest.approx(20 / 81, abs=1e-4)]
    monkeypatch.setattr(FakeProfiler, "key_averages", lambda self: [])
    with pytest.raises(DfkdError, match="no kernels"):
        measuring.kernels(ON_GPU, iterations=2, count=2)


class FakeEvent:
    """CUDA event whose clock advances by one second per event."""

    clock = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        FakeEvent.clock += 1
        self.at = FakeEvent.clock

    def elapsed_time(self, end: "FakeEvent") -> float:
        return 1000.0 * (end.at - self.at)


def test_timestamps_on_a_gpu_are_events_that_synchronize_only_when_read(monkeypatch: pytest.MonkeyPatch) -> None:
    synchronized: list[object] = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronized.append)
    timestamps = contenders.Timestamps(ON_GPU)
    for _ in range(3):
        timestamps.record()
    assert not synchronized
    assert timestamps.seconds() == [1.0, 1.0]
    assert len(synchronized) == 1
    assert timestamps.seconds() == []


def test_the_rows_so_far_are_written_when_a_later_contender_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measure(*_: object, **__: object) -> Iterator[list[Row]]:
        unknown = dict.fromkeys((*list(rows.SPEEDUPS.values())[1:], "peak_memory_mib", "imitation_memory_mib"))
        yield [replace(row("plain", 4.0), **unknown)]  # type: ignore[arg-type]
        yield [replace(row("plain", 4.0), **unknown), row("engine (+ folded teacher)", 1.0)]  # type: ignore[arg-type]
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(end_to_end, "measure", measure)
    monkeypatch.setattr("sys.argv", ["bench", "end-to-end", "--recipe", "digits", "--device", "cpu", "--out", str(tmp_path / "rows.csv")])
    with pytest.raises(RuntimeError, match="driver"):
        main()
    written = end_to_end.read(tmp_path / "rows.csv")
    assert [row["contender"] for row in written] == ["plain", "engine (+ folded teacher)"]
    # The plot and the table leave out what was not measured.
    plots.plot(written, tmp_path / "rows.png")
    assert "| plain | 4.000 | 4.00 |  |  |" in report.end_to_end_table(written)


def test_a_method_that_the_plain_loop_does_not_implement_is_refused() -> None:
    with pytest.raises(DfkdError, match="the plain loop implements"):
        contenders.check(load_recipe("digits-vae"))
    contenders.check(load_recipe("cifar10-mad"))


def test_rows_replace_those_of_the_same_case_only(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    end_to_end.write(path, [row("plain", 4.0), row("engine (+ folded teacher)", 1.0)])
    end_to_end.write(path, [replace(row("plain", 8.0), precision="bf16")])
    end_to_end.write(path, [row("plain", 3.0)])
    assert [(row["precision"], row["contender"], float(row["seconds_per_iteration"])) for row in table.read(path)] == [
        ("bf16", "plain", 8.0),
        ("fp32", "plain", 3.0),
    ]


def test_rows_of_earlier_versions_are_read_with_current_names(tmp_path: Path) -> None:
    old = ["plain_compiled", "plain, memory kept", "+ no wasted work", "+ chosen algorithms", "+ kept memory", "engine"]
    lines = ["recipe,contender,speedup_over_plain", *(f'r,"{name}",1.0' for name in old)]
    (tmp_path / "old.csv").write_text("\n".join(lines))
    read = end_to_end.read(tmp_path / "old.csv")
    assert [row["contender"] for row in read] == [
        "plain compiled",
        "plain + malloc reuse",
        "+ no redundant gradients",
        "+ CPU convolution selection",
        "+ malloc reuse",
        "engine",
    ]
    assert contenders.is_engine(read[-1]["contender"])
    assert {row["speedup_over_plain_compiled_malloc_reuse"] for row in read} == {""}


def test_the_memory_of_a_method_is_its_trainers_whole_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clock, "overall_peak_bytes", lambda clock: 12345)
    assert methods._peak_memory("digits-dfad", "cpu", 1) == 12345


def test_the_cost_of_a_method_is_relative_to_the_first() -> None:
    rows = methods.measure(["digits-dfad", "digits-bank"], CPU, 1, "")
    assert [row.recipe for row in rows] == ["digits-dfad", "digits-bank"]
    assert (rows[0].times_first, rows[0].memory_over_first_mib) == (1.0, 0.0)
    assert [row.fresh_rows + row.replayed_rows for row in rows] == [64, 64]
    assert all(row.iteration_ms > 0 and row.peak_memory_mib > 50 for row in rows)
