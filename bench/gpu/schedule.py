"""Runs the stages one after the other, each in its own process, and keeps their records even if a process dies."""

import fcntl
import hashlib
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dfkd_fast.errors import DfkdError
from dfkd_fast.kernels.extension import BINARY

from ..provenance import ROOT, version
from . import folder, process, summary
from .folder import Folder
from .records import FAILURES, Record, cases_done, parse, stages_done
from .stages import Stage
from .worker import GPU_LOST

__all__ = ["STATE", "Campaign", "alone", "digest_of_all", "folder_of"]

STATE = ROOT / ".bench-gpu"
RESERVE = 5.0  # seconds reserved for the final table
GRACE = 2.0  # seconds from a stage's deadline until it is killed
PROCESSES = 8  # maximum per stage, if each dies in one of its cases
LOG_END = 4000  # characters of a stage's output that are stored with its failure
SOURCES = ("bench", "csrc", "dfkd_fast", "kernels", "tests")
SOURCE_FILES = {".cpp", ".cu", ".cuh", ".h", ".py", ".toml"}


@dataclass
class Campaign:
    """All stages on one device and one state of the sources; a later call resumes.

    Args:
        stages: stages in order.
        files: files for the results.
        origin, data_root: see :class:`~bench.gpu.context.Context`.
        rehearse: whether to run at toy size, on a CPU.
        variables: environment variables of the stages, added to those of this process.
        log: called with one line when a stage starts or ends.
    """

    stages: Sequence[Stage]
    files: Folder
    origin: Mapping[str, Any] = field(default_factory=dict)
    data_root: Path | None = None
    rehearse: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)
    log: Callable[[str], None] = print
    records: list[Record] = field(default_factory=list)
    """Records of this call and of earlier ones with the same sources and device."""
    problems: list[str] = field(default_factory=list)
    """Errors outside the stages, one line each."""
    restarted: set[str] = field(default_factory=set)
    """Stages whose earlier records are removed as soon as there are new ones."""

    @property
    def failed(self) -> bool:
        """Whether a case or a stage failed, or a file could not be written."""
        return bool(self.problems or self.files.problems) or any(one.status in FAILURES for one in summary.latest(self.records))

    def run(self, minutes: float, chosen: Sequence[str] = ()) -> list[str]:
        """Run the stages that are not done, or the chosen ones; a chosen stage that is done is run again.

        Returns:
            The lines of the final table.
        """
        end = time.monotonic() + 60 * minutes - RESERVE
        self.records = self.files.records()
        done = stages_done(self.records)
        try:
            with _signals_as_interrupt():
                for stage in self.stages:
                    if stage.name in done and not chosen:
                        self.log(f"{stage.name}: done in an earlier call")
                    elif not chosen or stage.name in chosen:
                        self._run_stage(stage, end, restart=stage.name in done)
        except KeyboardInterrupt:
            self.problems.append("INTERRUPTED: the earlier records are kept")
        self.files.replace(folder.FAILURES, "\n".join([*self.problems, *self.files.problems, summary.failures(self.records)]))
        self.files.replace(folder.SUMMARY, "\n".join(self._table()) + "\n")
        self.files.copy()
        return self._table()

    def _table(self) -> list[str]:
        return summary.lines(self.records, [stage.name for stage in self.stages], [*self.problems, *self.files.problems])

    def _run_stage(self, stage: Stage, end: float, *, restart: bool) -> None:
        limit = stage.rehearsal_limit if self.rehearse else stage.limit
        begin = time.monotonic()
        deadline = min(begin + limit, end - GRACE)
        if deadline - begin < min(stage.needs, limit):
            text = f"needs {stage.needs:.0f} s, and {max(0.0, deadline - begin):.0f} s are left"
            if not restart:
                self.take(Record(stage.name, "", "left", text))
            self.log(f"{stage.name}: {text}")
            return
        if restart:
            self.restarted.add(stage.name)
        self.log(f"{stage.name}: at most {deadline - begin:.0f} s")
        run = _StageRun(self, stage, deadline)
        try:
            reason = run.to_its_end()
        except KeyboardInterrupt:
            if stage.name not in self.restarted:
                self.take(Record(stage.name, "", "left", "interrupted"))
            raise
        seconds = round(time.monotonic() - begin, 2)
        if stage.name in self.restarted:
            self.problems.append(f"FAILED {stage.name}: {reason}; it recorded nothing, and the records of an earlier call stay")
        elif reason is not None:
            self.take(Record(stage.name, "", "failed", reason, run.log_end, seconds))
        self.log(f"{stage.name}: {summary.describe(self.records, stage.name)}, {seconds:.0f} s")
        self.files.copy()

    def take(self, record: Record) -> None:
        """Keep a record. A record without origin, which the stage did not send itself, gets the campaign's."""
        record = record if record.origin else replace(record, origin=dict(self.origin))
        if record.stage in self.restarted:
            self.restarted.remove(record.stage)
            self.records = [one for one in self.records if one.stage != record.stage]
            self.files.replace_records(self.records)
        self.records.append(record)
        self.files.append(folder.RESULTS, record.line() + "\n")


class _StageRun:
    """Runs one stage, in a new process after each process that a case has killed."""

    def __init__(self, campaign: Campaign, stage: Stage, deadline: float) -> None:
        self.campaign, self.stage, self.deadline = campaign, stage, deadline
        self.completed = set() if stage.name in campaign.restarted else cases_done(campaign.records, stage.name)
        """Cases that are not run again."""
        self.running = ""
        """The running case."""
        self.ended = False
        """Whether the stage sent its own record."""
        self.log_end = ""
        campaign.files.append(folder.LOG, f"\n== {stage.name}\n")

    def to_its_end(self) -> str | None:
        """Run the stage; returns why it did not complete, or None."""
        for _ in range(PROCESSES):
            fatal_case, ending = "", self._process()
            if self.ended:
                return None
            reason = "the GPU was lost to its process" if ending.code == GPU_LOST else ending.describe()
            if self.running:
                fatal_case, self.running = self.running, ""
                self.completed.add(fatal_case)
                self.campaign.take(Record(self.stage.name, fatal_case, "failed", reason, self.log_end))
            again = ending.code == GPU_LOST or (fatal_case and not ending.timed_out)
            if not again or self.deadline - time.monotonic() < self.stage.needs:
                break
        return reason

    def _process(self) -> process.Ending:
        seconds = self.deadline - time.monotonic()
        job = {
            "stage": self.stage.name,
            "function": self.stage.function,
            "seconds": seconds,
            "done": sorted(self.completed),
            "rehearse": self.campaign.rehearse,
            "data_root": str(self.campaign.data_root or ""),
            "origin": dict(self.campaign.origin),
        }
        return process.run(
            [sys.executable, "-m", "bench.gpu.worker"],
            json.dumps(job).encode(),
            {"PYTHONUNBUFFERED": "1", **self.campaign.variables},
            seconds + GRACE,
            on_line=self._line,
            on_output=self._output,
            on_tick=self.campaign.files.copy,
        )

    def _line(self, line: bytes) -> None:
        try:
            if line.startswith(b'{"started"'):
                self.running = json.loads(line)["started"]
                return
            record = parse(line.decode())
        except (TypeError, ValueError) as error:
            self.campaign.problems.append(f"FAILED {self.stage.name} sent an invalid record: {error}")
            return
        self.ended |= not record.case
        self.running = "" if record.case == self.running else self.running
        if record.status != "left":
            self.completed.add(record.case)
        self.campaign.take(record)

    def _output(self, data: bytes) -> None:
        text = data.decode(errors="replace")
        self.log_end = (self.log_end + text)[-LOG_END:]
        self.campaign.files.append(folder.LOG, text)


@contextmanager
def alone() -> Iterator[None]:
    """Context manager that prevents another campaign in this checkout, which would share the device and the files.

    Raises:
        DfkdError: Another campaign is running.
    """
    with (STATE / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DfkdError("another python -m bench gpu is running in this checkout") from None
        yield


def folder_of(device_name: str) -> Path:
    """Return the folder that keeps the records of a device from call to call, for one state of the sources."""
    return STATE / f"{re.sub(r'[^a-z0-9]+', '-', device_name.lower()).strip('-')}-{digest_of_all()}"


def digest_of_all() -> str:
    """Return a hash of the sources, committed or not, the compiled extension and the versions of its dependencies."""
    digest = hashlib.sha256(repr([version(name) for name in ("torch", "triton", "numba")]).encode())
    if BINARY.is_file():
        digest.update(BINARY.read_bytes())
    for name in SOURCES:
        for path in sorted((ROOT / name).rglob("*")):
            if path.suffix in SOURCE_FILES and path.is_file():
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@contextmanager
def _signals_as_interrupt() -> Iterator[None]:
    """Context manager in which SIGTERM and SIGHUP raise KeyboardInterrupt: the stage ends, and the table is still written."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
