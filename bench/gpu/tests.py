"""Stage 3: the tests that need a GPU, on all cores; those that need its memory or may break their process come last, one by one."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from .. import provenance
from .context import Context

__all__ = ["run"]

SPARE = 3.0  # seconds before the deadline at which pytest is stopped


class Part(NamedTuple):
    """One call of pytest."""

    arguments: Sequence[str]
    """Which tests."""
    workers: str


ON_GPU = (
    Part(("-m", "gpu and not alone and not last"), "auto"),
    Part(("-m", "gpu and alone"), "1"),
    Part(("-m", "gpu and last"), "1"),
)
# The same calls with the tests of a backend that a CPU runs in the place of a GPU.
ON_CPU = (
    Part(("-p", "tests.kernels.on_cpu", "--on-cpu=cuda", "--sample", "tests/kernels/test_moments.py"), "2"),
    Part(("-p", "tests.kernels.on_cpu", "--on-cpu=triton", "--sample", "tests/kernels/test_moments.py"), "1"),
)


class _Reporter:
    """Records each test as it ends, and stops pytest when the time is over."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.collected: set[str] = set()
        self.ended: set[str] = set()
        self.out_of_time = False

    def pytest_xdist_node_collection_finished(self, node: Any, ids: Sequence[str]) -> None:
        self.collected.update(ids)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._record(report.nodeid, "failed", report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._record(report.nodeid, "failed", report)
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "expected to fail"
            self.context.record(report.nodeid, "skipped", reason)
        elif report.when == "call":
            self.context.record(report.nodeid, seconds=round(report.duration, 3))
        self.ended.add(report.nodeid)
        if self.context.seconds_left() < SPARE and not self.out_of_time:
            self.out_of_time = True
            pytest.exit("no time is left", returncode=0)

    def _record(self, case: str, status: Any, report: pytest.CollectReport | pytest.TestReport) -> None:
        lines = [line for line in report.longreprtext.splitlines() if line.strip()]
        # pytest marks the lines of the error itself with an E
        reasons = [line[1:].strip() for line in lines if line.startswith("E ")] or lines or [f"failed in {report.when}"]
        self.context.record(case, status, reasons[0], detail=report.longreprtext)


def run(context: Context) -> None:
    """Run the tests that no earlier call settled; every test is a case."""
    with tempfile.TemporaryDirectory() as folder:
        settled = Path(folder) / "settled.txt"
        settled.write_text("\n".join(context.done))
        for part in ON_CPU if context.rehearse else ON_GPU:
            reporter = _Reporter(context)
            code = pytest.main(
                [
                    *("-q", "--tb=short", "-p", "no:cacheprovider", "-p", "bench.gpu.pytest_plugin", f"--settled={settled}"),
                    *("-n", part.workers, f"--rootdir={provenance.ROOT}", *part.arguments),
                ],
                plugins=[reporter],
            )
            if code in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR):
                context.record(" ".join(part.arguments), "failed", f"pytest ended with exit code {int(code)}: see log.txt")
            left = sorted(reporter.collected - reporter.ended)
            context.left.extend(left)
            for case in left:
                context.record(case, "left", "no time was left")
