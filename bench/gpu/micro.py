"""Stage 4: the kernels against eager PyTorch, torch.compile and other libraries, at realistic sizes.

A kernel that runs for microseconds takes seconds to compile. Therefore, before anything is timed, parallel processes compile the Triton
kernels and torch.compile's code into the on-disk caches. Then every case is measured, without torch.compile if its code is not in the
cache.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
import torch._dynamo.utils
import torch._inductor.config

from dfkd_fast.kernels import Backend

from .. import table
from ..micro import PROVIDERS, Case, discrepancy, runner, timing
from ..micro.rows import Row
from ..micro.workload import Mode, Provider
from ..processes import Pool, WorkerError
from ..provenance import measured_on
from . import rehearsal
from .context import Context, GpuLostError
from .records import Status

__all__ = ["Job", "Plan", "compile_job", "run"]

COMPILE, TRITON = "compile", "triton"
BACKENDS: tuple[Backend, ...] = ("reference", "triton", "cuda")
OURS = ("numba", "triton", "cuda", "fused_ema")
PEERS = tuple(name for name in PROVIDERS if name not in (*OURS, "reference"))
CASE_NEEDS = 1.5  # seconds
COMPILE_SHARE = 0.5  # maximum fraction of the remaining time
MAX_PROCESSES = 8  # each imports for seconds and takes GPU memory
FLOAT, HALF = torch.float32, torch.bfloat16
LAYOUTS = ("contiguous", "channels_last")


class Job(NamedTuple):
    """A provider to compile for a case, in another process."""

    provider: str
    case: Case


class Plan(NamedTuple):
    """Cases to measure."""

    cases: Sequence[Case]
    """Most important first, because time may not suffice for all."""
    highlights: Sequence[Case]
    """Cases whose result is part of the final table."""
    compiled: Sequence[Case]
    """Cases that are also compared with torch.compile."""
    seconds: float
    """Target time of a case's timed calls."""


def _cases(
    kernels: str, variants: str, sizes: str, dtypes: Sequence[torch.dtype], layouts: Sequence[str] = LAYOUTS[:1], mode: Mode = "full"
) -> list[Case]:
    """Return the Cartesian product; the strings are lists separated by spaces."""
    every = product(sizes.split(), dtypes, variants.split(" "), layouts, kernels.split())
    return [Case(kernel, variant, size, dtype, layout, mode) for size, dtype, variant, layout, kernel in every]


_AVERAGES = [
    *_cases("ema", "plain", "resnet50 resnet18 generator-a generator-b", [FLOAT], mode="update"),
    *_cases("ema", "shadow", "resnet50", [FLOAT], mode="update"),
]
_LOGITS = _cases("kl l1 js", "both", "256x1000 256x10", [FLOAT])
_IMAGES = _cases("concat", "dataset batch", "2x256x3x32x32 2x128x3x224x224", [FLOAT])
_MAPS = _cases("moments", "", "128x256x56x56 256x512x4x4", [FLOAT])
COMPILED = [
    *_LOGITS,
    *_IMAGES,
    *_MAPS,
    *_cases("kl l1 js", "both", f"256x1000 {discrepancy.SEGMENTATION}", [HALF]),
    *_cases("concat", "dataset batch", "2x256x3x32x32 2x128x3x224x224", [HALF]),
    *_cases("moments", "", "128x256x56x56 256x512x4x4", [HALF], ["channels_last"]),
    *_cases("moments", "layers", "36x256x256x8x8", [HALF], ["channels_last"]),
    *_cases("norm", " residual", "128x64x32x32 256x64x56x56", [HALF], ["channels_last"]),
    *_cases("norm", "", "128x64x32x32", [FLOAT, torch.float16], ["channels_last"]),
    *_cases("bias_act", "relu residual moments", "128x256x28x28", [HALF], ["channels_last"]),
    *_cases("kl l1 js", "student", "256x1000 256x10", [FLOAT]),
    *_cases("kl l1 js", "both", f"512x10 {discrepancy.SEGMENTATION}", [FLOAT]),
    *_cases("moments", "", "128x256x56x56 256x512x4x4", [FLOAT], ["channels_last"]),
    *_cases("moments", "", "128x256x56x56 256x512x4x4", [HALF]),
    *_AVERAGES,  # lists of hundreds of tensors take longest to compile
]
ON_GPU = [
    *_AVERAGES,
    *(case for case in COMPILED if case not in _AVERAGES),
    *_cases("kl l1 js", "student", f"256x1000 {discrepancy.SEGMENTATION}", [HALF]),
    *_cases("kl l1 js", "both", "256x10 512x10", [HALF]),
    *_cases("kl l1 js", "student", f"512x10 {discrepancy.SEGMENTATION}", [FLOAT]),
    *_cases("kl l1 js", "student", "256x10 512x10", [HALF]),
]
IN_REHEARSAL = [
    *_cases("ema", "plain shadow", "toy", [FLOAT], mode="update"),
    *_cases("kl l1 js", "both", "4x5", [FLOAT]),
    *_cases("concat", "dataset batch", "2x2x3x4x4", [FLOAT]),
    *_cases("moments", "", "3x4x5x5", [FLOAT], LAYOUTS),
    *_cases("moments", "layers", "2x3x4x5x5", [FLOAT]),
    *_cases("norm", " residual", "3x4x5x5", [FLOAT], ["channels_last"]),
    *_cases("bias_act", "relu residual moments", "3x4x5x5", [FLOAT], ["channels_last"]),
    *_cases("kl l1 js", "student", "2x3x4x5", [HALF]),
]
GPU_PLAN = Plan(ON_GPU, [*_AVERAGES, *_LOGITS[:3], *_IMAGES, *_MAPS], COMPILED, seconds=0.15)
REHEARSAL_PLAN = Plan(IN_REHEARSAL, IN_REHEARSAL[:3], _cases("l1", "both", "4x5", [FLOAT]), seconds=0.02)


def run(context: Context) -> None:
    """Compile, then measure: a record for each row, and one for each case that compares our kernels with their peers."""
    plan = REHEARSAL_PLAN if context.rehearse else GPU_PLAN
    timer = timing.timer_for(context.device)
    with_compile = runner.Run(
        device=context.device,
        modes=(),
        providers=PROVIDERS,
        repeats=None,
        timer=timer,
        copy_bandwidth=timing.copy_bandwidth(timer, context.device),
        provenance=measured_on(context.device, context.origin.get("command", ""), context.origin.get("commit")),
        backends=BACKENDS,
        seconds=plan.seconds,
    )
    without_compile = replace(with_compile, providers=[name for name in PROVIDERS if name != COMPILE])
    _configure_inductor()
    processes = max(1, min(MAX_PROCESSES, len(os.sched_getaffinity(0)) - 1))
    with Pool(partial(compile_job, context.device), processes) as pool:
        compiled = _compile(context, pool, plan)

    def name(case: Case) -> str:  # a case that fails with torch.compile is retried without it by the process that continues the stage
        return _compiled_name(case) if case in compiled else str(case)

    for case in context.cases(plan.cases, name, needs=CASE_NEEDS):
        with context.attempt(name(case)):
            _measure(context, with_compile if case in compiled else without_compile, case, case in plan.highlights)
    if compiled:
        _record_cache_hits(context)


def compile_job(device: torch.device, job: Job) -> float:
    """Compile a provider for a case, including gradients, into the on-disk caches; returns the seconds it took."""
    begin = time.monotonic()
    if device.type == "cpu":
        rehearsal.prepare()
    _configure_inductor()
    job.case.workload().trial(_provider(job, device), job.case.mode, device).results()
    torch.cuda.empty_cache()  # all processes share the GPU's memory
    return time.monotonic() - begin


def _measure(context: Context, measured: runner.Run, case: Case, highlight: bool) -> None:
    begin = time.monotonic()
    for rows in replace(measured, modes=[case.mode]).rows(case.workload()):
        for row in rows:
            context.record(f"{case} / {row.provider}", _status(row), _described(row), table="micro", row=table.cells(row))
        # A failed provider may have lost the GPU: then the case fails here, and the stage continues in another process.
        torch.ones(1, device=context.device).sum().item()
        seconds = round(time.monotonic() - begin, 2)
        context.record(str(case), text=f"{case}: {_compared(rows)}", seconds=seconds, highlight=highlight, table="comparison")
        if failed := next((row.timed for row in rows if timing.CAPTURE_FAILED in row.timed), None):
            raise GpuLostError(failed)


def _status(row: Row) -> Status:
    beginnings: dict[str, Status] = {"ok": "ok", "not installed": "skipped", "wrong": "wrong", "failed": "failed"}
    return next(status for beginning, status in beginnings.items() if row.status.startswith(beginning))


def _described(row: Row) -> str:
    if row.median_us is None:
        return row.status
    parts = [
        f"{row.provider} {row.median_us:.4g} us",
        "" if row.share_of_copy is None else f"{row.share_of_copy:.0%} of the copy bandwidth",
        "" if row.speedup_over_eager is None or row.provider == "eager" else f"{row.speedup_over_eager:.3g} x eager",
    ]
    return ", ".join(filter(None, parts))


def _compared(rows: Sequence[Row]) -> str:
    """Describe our fastest provider, and its speedup over the fastest peer that does the same work."""
    ours, peer = (
        min((row for row in rows if row.provider in names and row.status == "ok" and row.median_us), key=_median, default=None)
        for names in (OURS, PEERS)
    )
    if ours is None:
        return "none of our providers was timed"
    if peer is None:
        return _described(ours)
    return f"{_described(ours)}, {_median(peer) / _median(ours):.3g} x the fastest peer ({peer.provider})"


def _median(row: Row) -> float:
    return row.median_us or 0.0


def _compile(context: Context, pool: Pool[Job, float], plan: Plan) -> set[Case]:
    """Compile for the cases that are not done, most important first, and record how long it took.

    Returns:
        The cases that torch.compile compiled. For the others of ``plan.compiled``, the reason is recorded. A Triton kernel that does not
        compile here is compiled, or fails, where it is measured.
    """
    jobs = []
    for case in plan.cases:
        if str(case) not in context.done and _provider(Job(TRITON, case), context.device).unavailable is None:
            jobs.append(Job(TRITON, case))
        if case in plan.compiled and _compiled_name(case) not in context.done:
            if (reason := _provider(Job(COMPILE, case), context.device).unavailable) is None:
                jobs.append(Job(COMPILE, case))
            else:
                context.record(_compiled_name(case), "skipped", reason)
    if not jobs or context.seconds_left() <= 0:
        return set()
    begin = time.monotonic()
    results = dict(pool.results(jobs, begin + context.seconds_left() * COMPILE_SHARE))
    taken = round(time.monotonic() - begin, 2)
    times = {f"{job.case} / {job.provider}": round(took, 2) for job, took in results.items() if not isinstance(took, WorkerError)}
    text = f"compiled {len(times)} of {len(jobs)} in {taken:.0f} s, the slowest in {max(times.values(), default=0):.0f} s"
    context.record("compiling", text=text, seconds=taken, table="compilation", row={"processes": pool.processes, **times})
    compiled = set()
    for job in jobs:
        result = results.get(job)
        if job.provider == COMPILE and isinstance(result, WorkerError):
            context.record(_compiled_name(job.case), "failed", str(result), detail=result.detail)
        elif job.provider == COMPILE and result is not None:
            compiled.add(job.case)
        elif job.provider == COMPILE:
            context.leave(_compiled_name(job.case))
    return compiled


def _compiled_name(case: Case) -> str:
    """Return the name of a case's record with torch.compile."""
    return f"{case} / {COMPILE}"


def _provider(job: Job, device: torch.device) -> Provider:
    return next(provider for provider in job.case.workload().providers(device, BACKENDS) if provider.name == job.provider)


def _configure_inductor() -> None:
    """Configure Inductor equally in all processes, because the caches' keys depend on it."""
    torch._inductor.config.compile_threads = 1
    # Autotuning is unreliable while several processes share a GPU: it is repeated where the case is timed.
    torch._inductor.config.autotune_local_cache = False
    # Detecting the CPU's vector instructions would take most of a rehearsal: it starts a Python process for each of them.
    torch._inductor.config.cpp.vec_isa_ok = True


def _record_cache_hits(context: Context) -> None:
    counters = torch._dynamo.utils.counters["inductor"]
    row = {name: counters[f"fxgraph_cache_{name}"] for name in ("hit", "miss", "bypass")}
    context.record("compiler cache", text=", ".join(f"{name} {count}" for name, count in row.items()), table="compilation", row=row)
