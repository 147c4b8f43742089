"""Stage 3: the tests that need a GPU, on all cores; those that need much memory or may crash their process come last, one by one."""

import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from .context import Context
from .records import Status

__all__ = ["ON_CPU", "ON_GPU", "Part", "run"]

ROOT = Path(__file__).parents[2]
# Not xdist's auto, which counts physical cores: compiling takes most of the time. Limited, because each process takes GPU memory.
CORES = min(16, len(os.sched_getaffinity(0)))
CHUNK = 4  # tests per chunk of a worker
SPARE = 2.0  # seconds before the deadline at which unfinished tests are recorded as left


class Part(NamedTuple):
    """One run of pytest."""

    arguments: Sequence[str]
    """Arguments that select the tests."""
    workers: int

    def __str__(self) -> str:
        return " ".join(self.arguments)


ON_GPU: Sequence[Part] = (
    Part(("-m", "gpu and not alone and not last"), CORES),
    Part(("-m", "gpu and alone"), 1),
    Part(("-m", "gpu and last"), 1),
)
# The same for the tests of a GPU backend that run on a CPU, except those that take seconds in Triton's interpreter: the stage is rehearsed,
# not the kernels.
_MOMENTS = ("-p", "tests.kernels.on_cpu", "--sample", "tests/kernels/test_moments.py")
_FAST = "not any_shape and not bitwise and not float64 and not float32 and not large_mean"
ON_CPU: Sequence[Part] = (
    Part((*_MOMENTS, "--on-cpu=cuda"), 2),
    Part((*_MOMENTS, "--on-cpu=triton", "-k", _FAST), 1),
)


class _Reporter:
    """Records each test as it ends."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.collected: set[str] = set()
        self.ended: set[str] = set()

    def pytest_xdist_node_collection_finished(self, node: Any, ids: Sequence[str]) -> None:
        self.collected.update(ids)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._record_failure(report, report.nodeid or "collection")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._record_failure(report, report.nodeid)
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "expected to fail"
            self.context.record(report.nodeid, "skipped", reason.removeprefix("Skipped: "))
        elif report.when == "call":
            self.context.record(report.nodeid, seconds=round(report.duration, 3))
        if report.failed or report.skipped or report.when == "call":
            self.ended.add(report.nodeid)

    def leave(self) -> None:
        """Record the tests that did not run, or did not finish, as left."""
        for case in sorted(self.collected - self.ended):
            self.context.leave(case)

    def _record_failure(self, report: pytest.CollectReport | pytest.TestReport, case: str) -> None:
        lines = [line for line in report.longreprtext.splitlines() if line.strip()] or ["no reason given"]
        # pytest marks the lines of the error with an E; a crashed worker has none
        errors = [line[1:].strip() for line in lines if line.startswith("E ")]
        self.context.record(case, "failed", errors[0] if errors else lines[-1], detail=report.longreprtext)


def run(context: Context) -> None:
    """Run the tests that no earlier call completed. Every test is a case, and every part is one."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # the workers use all cores
    parts = [part for part in (ON_CPU if context.rehearse else ON_GPU) if str(part) not in context.done]
    reporters = {part: _Reporter(context) for part in parts}
    begin = time.monotonic()

    def stop() -> None:
        # pytest would wait for the running test, and xdist for its workers.
        for part, reporter in list(reporters.items()):
            reporter.leave()
            context.left.append(str(part))
            context.record(str(part), "left", "no time was left", table="pytest")
        context.finish(time.monotonic() - begin)
        sys.stdout.flush()
        os._exit(0)

    timer = threading.Timer(max(0.0, context.seconds_left() - SPARE), stop)
    timer.daemon = True
    timer.start()
    with tempfile.TemporaryDirectory() as folder:
        completed = Path(folder) / "completed.txt"
        completed.write_text("\n".join(context.done))
        options = (
            "-q",
            "--tb=short",
            "--continue-on-collection-errors",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:benchmark",  # a plugin that warns in every worker
            "-p",
            "bench.gpu.pytest_plugin",
            f"--completed={completed}",
            # Small, because slow tests are adjacent and xdist assigns a quarter of all tests in advance.
            f"--maxschedchunk={CHUNK}",
        )
        for part in parts:
            code = pytest.main([*options, f"--rootdir={ROOT}", "-n", str(part.workers), *part.arguments], plugins=[reporters[part]])
            reporter = reporters.pop(part)
            reporter.leave()
            ended = code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
            nothing_left = code == pytest.ExitCode.NO_TESTS_COLLECTED and bool(context.done)
            status: Status = "ok" if ended or nothing_left else "failed"
            context.record(str(part), status, f"pytest ended with exit code {int(code)}", table="pytest")
    timer.cancel()
