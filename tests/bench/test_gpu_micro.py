"""The stage ``micro`` of ``python -m bench gpu``, in this process and on toy cases. No test checks a time."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gpu import micro, rehearsal
from bench.gpu.context import Context, GpuLostError
from bench.gpu.records import Record
from bench.micro import Case, discrepancy, rows, runner, timing
from bench.processes import WorkerError
from bench.provenance import measured_on
from dfkd_fast.kernels import dispatch

SOON = 60.0
L1, KL = (Case(kernel, "both", "4x5", torch.float32, "contiguous", "full") for kernel in ("l1", "kl"))
PLAN = micro.Plan([L1, KL], [KL], [L1, KL], seconds=0.0)
Stage = Callable[..., list[Record]]


class Compilers:
    """Fake of the compiling processes, with a result for each job."""

    processes = 2

    def __init__(self) -> None:
        self.results_by_job: dict[micro.Job, float | WorkerError | None] = {}
        self.jobs: list[micro.Job] = []

    def __call__(self, *_: object) -> "Compilers":
        return self

    def __enter__(self) -> "Compilers":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def results(self, jobs: Iterable[micro.Job], deadline: float) -> Iterator[tuple[micro.Job, float | WorkerError]]:
        for job in jobs:
            self.jobs.append(job)
            if (result := self.results_by_job.get(job, 1.5)) is not None:
                yield job, result


@pytest.fixture
def compilers(monkeypatch: pytest.MonkeyPatch) -> Compilers:
    """All jobs succeed, unless a test sets another result; torch.compile returns the function itself."""
    made = Compilers()
    monkeypatch.setattr(micro, "Pool", made)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    return made


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Run the stage on the CPU and return its records."""
    monkeypatch.setattr(timing, "COPIED_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(micro, "REHEARSAL_PLAN", PLAN)
    monkeypatch.setattr(micro, "BACKENDS", ("reference", "numba", "triton"))
    monkeypatch.setitem(dispatch.BACKENDS_BY_DEVICE, "cpu", ["numba", "reference"])

    def run(seconds: float = SOON, done: Sequence[str] = ()) -> list[Record]:
        records: list[Record] = []
        micro.run(Context("micro", "cpu", True, time.monotonic() + seconds, records.append, done=done))
        return records

    return run


def statuses(records: Iterable[Record], *providers: str) -> dict[str, str]:
    """Return the last status of every case, or only of the rows of the given providers."""
    endings = tuple(f"/ {provider}" for provider in providers)
    return {record.case: record.status for record in records if record.case.endswith(endings or ("",))}


def test_every_row_of_every_provider_is_a_record(stage: Stage, compilers: Compilers) -> None:
    records = stage()
    of_rows = [record for record in records if record.table == "micro"]
    assert {tuple(record.row) for record in of_rows} == {rows.COLUMNS}
    names = ["eager", "compile", "reference", "numba", "triton"]
    assert [record.case for record in of_rows] == [f"{case} / {name}" for case in (L1, KL) for name in names]
    measured = [record for record in of_rows if record.row["provider"] != "triton"]
    assert {record.status for record in of_rows if record not in measured} == {"skipped"}
    assert {record.status for record in measured} == {"ok"}
    assert all(record.row["median_us"] and record.row["speedup_over_eager"] for record in measured)
    assert all(record.row["speedup_over_compile"] for record in measured)


def test_nothing_is_compiled_while_something_is_measured(stage: Stage, compilers: Compilers, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[str] = []
    results, measure = compilers.results, micro._measure

    def compiling(jobs: Sequence[micro.Job], deadline: float) -> Iterator[tuple[micro.Job, float | WorkerError]]:
        passes.extend(f"compile {job.provider}" for job in jobs)
        return results(jobs, deadline)

    def measuring(*arguments: Any) -> None:
        passes.append("measure")
        measure(*arguments)

    monkeypatch.setattr(compilers, "results", compiling)
    monkeypatch.setattr(micro, "_measure", measuring)
    monkeypatch.setitem(dispatch._UNAVAILABLE, "triton", None)
    monkeypatch.setitem(dispatch.BACKENDS_BY_DEVICE, "cpu", ["triton", "reference"])
    stage()
    assert passes == ["compile triton", "compile compile"] * 2 + ["measure"] * 2


def test_a_case_has_one_line_that_names_our_fastest_provider(stage: Stage, compilers: Compilers) -> None:
    records = {record.case: record for record in stage()}
    assert records[str(KL)].highlight
    assert not records[str(L1)].highlight
    assert records[str(KL)].text.startswith(f"{KL}: numba ")
    assert records[str(KL)].text.endswith(("x the fastest peer (eager)", "x the fastest peer (compile)"))


@pytest.mark.parametrize(
    ("provider", "kind"), [("reference", "neither"), ("numba", "ours"), ("fused_ema", "ours"), ("eager", "peer"), ("liger", "peer")]
)
def test_our_fastest_provider_is_compared_with_the_fastest_peer(provider: str, kind: str) -> None:
    here = measured_on("a GPU", "")
    usual = rows.Row("ema", "plain", "update", "toy", "float32", "contiguous", "cuda", "ok", median_us=9.0, provenance=here)
    slow = [usual, replace(usual, provider="foreach_lerp")]
    fast = replace(usual, provider=provider, median_us=3.0)
    text = micro._compared([*slow, fast])
    assert (
        text
        == {
            "neither": "cuda 9 us, 1 x the fastest peer (foreach_lerp)",
            "ours": f"{provider} 3 us, 3 x the fastest peer (foreach_lerp)",
            "peer": f"cuda 9 us, 0.333 x the fastest peer ({provider})",
        }[kind]
    )
    lacking = replace(usual, provider="flat_lerp", status="ok, without num_batches_tracked", median_us=1.0)
    assert micro._compared([*slow, fast, lacking]) == text


def test_a_wrong_result_is_a_wrong_record_without_a_time(stage: Stage, compilers: Compilers, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(student: Tensor, teacher: Tensor, *, reduction: str) -> Tensor:
        return torch.nn.functional.l1_loss(student, teacher, reduction=reduction) * 1.001

    monkeypatch.setattr(discrepancy, "l1_discrepancy", off)
    records = stage()
    wrong = [record for record in records if record.status == "wrong"]
    assert {record.case for record in wrong} == {f"{L1} / reference", f"{L1} / numba"}
    assert all(record.text.startswith("wrong: loss is off by") for record in wrong)
    assert all(record.row["median_us"] is None for record in wrong)
    assert set(statuses(records, "eager", "compile").values()) == {"ok"}
    assert {record.case: record.text for record in records}[str(L1)] == f"{L1}: none of our providers was timed"


def test_a_case_that_raises_does_not_affect_the_others(stage: Stage, compilers: Compilers, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Tensor:
        raise RuntimeError("planted")

    monkeypatch.setitem(discrepancy.FUNCTIONS, "l1", (broken, broken))
    ended = statuses(stage())
    assert ended[f"{L1} / compile"] == "failed"
    assert ended[str(KL)] == ended[f"{KL} / compile"] == "ok"
    compilers.results_by_job = {micro.Job("compile", L1): WorkerError("planted")}
    ended = statuses(stage(done=[f"{L1} / compile", str(KL), f"{KL} / compile"]))
    assert ended[str(L1)] == "failed"  # retried without torch.compile


def test_a_case_after_which_the_device_does_not_work_has_failed(
    stage: Stage, compilers: Compilers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the failure of one provider may lose the GPU, which its row alone does not show."""

    def lost(*_: object, **__: object) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "ones", lost)
    records = stage()
    last = {record.case: record for record in records}
    assert (last[f"{KL} / compile"].status, last[f"{KL} / eager"].status) == ("failed", "ok")
    assert last[f"{KL} / compile"].text == "RuntimeError: CUDA error: an illegal memory access was encountered"


def test_a_case_that_was_not_compiled_is_measured_without_torch_compile(stage: Stage, compilers: Compilers) -> None:
    compilers.results_by_job = {
        micro.Job("compile", L1): WorkerError("BackendCompilerFailed: planted", "traceback"),
        micro.Job("compile", KL): None,
    }
    records = stage()
    last = {record.case: record for record in records}
    assert (last[f"{L1} / compile"].status, last[f"{L1} / compile"].text) == ("failed", "BackendCompilerFailed: planted")
    assert last[f"{L1} / compile"].detail == "traceback"
    assert last[f"{KL} / compile"].status == "left"
    assert set(statuses(records, "eager", "reference", "numba").values()) == {"ok"}
    assert len([record for record in records if record.case == f"{L1} / eager"]) == 1


def test_without_a_compiler_its_rows_are_skipped(stage: Stage, compilers: Compilers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.micro.workload._no_compiler", lambda _: "no C++ compiler")
    records = stage()
    assert statuses(records, "compile") == {f"{case} / compile": "skipped" for case in (L1, KL)}
    assert not compilers.jobs


def test_without_time_all_cases_are_left(stage: Stage, compilers: Compilers) -> None:
    assert [(record.case, record.status) for record in stage(seconds=-1.0)] == [(str(L1), "left"), (str(KL), "left")]
    assert not compilers.jobs


def test_cases_that_an_earlier_call_completed_are_not_measured_again(stage: Stage, compilers: Compilers) -> None:
    records = stage(done=[str(L1), str(KL), f"{KL} / compile"])
    assert compilers.jobs == [micro.Job("compile", L1)]
    assert {record.row["kernel"] for record in records if record.table == "micro"} == {"l1"}


@pytest.mark.parametrize("plan", [micro.GPU_PLAN, micro.REHEARSAL_PLAN])
def test_the_plans_name_cases_that_exist_once_each(plan: micro.Plan) -> None:
    assert len(set(plan.cases)) == len(plan.cases)
    assert {*plan.compiled, *plan.highlights} <= set(plan.cases)
    assert 0 < len(plan.highlights) <= 14
    for case in plan.cases:
        assert case.workload().floor_bytes(case.mode) > 0


def test_a_compile_job_runs_the_compiled_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the mode that is measured, so that the cached code is found."""
    called: list[Callable[..., object]] = []

    def compiled(function: Callable[..., object], **_: object) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            called.append(function)
            return function(*arguments)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(rehearsal, "prepare", lambda: None)
    micro.compile_job(torch.device("cpu"), micro.Job("compile", KL))
    assert called
    assert set(called) == {discrepancy.FUNCTIONS["kl"][0]}


def test_a_failed_capture_ends_the_process_but_keeps_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    here, timed = measured_on("a GPU", ""), f"behind a sleep, {timing.CAPTURE_FAILED}: x"
    row = rows.Row("kl", "both", "full", "4x5", "float32", "contiguous", "cuda", "ok", timed=timed, provenance=here)
    monkeypatch.setattr(runner.Run, "rows", lambda self, workload: iter([[row]]))
    cpu, records = torch.device("cpu"), list[Record]()
    run = runner.Run(device=cpu, modes=(), providers=(), repeats=None, timer=timing.timer_for(cpu), copy_bandwidth=1.0, provenance=here)
    with pytest.raises(GpuLostError, match=timing.CAPTURE_FAILED):
        micro._measure(Context("micro", cpu.type, True, time.monotonic() + SOON, records.append), run, KL, False)
    assert [record.case for record in records] == [f"{KL} / cuda", str(KL)]
