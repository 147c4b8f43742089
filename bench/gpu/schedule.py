"""Runs the stages one after the other, each in a process of its own, and keeps what they send, whatever happens to them."""

import hashlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..provenance import ROOT
from . import records, summary
from .records import FAILURES, Record
from .stages import Stage
from .worker import RESTART

__all__ = ["STATE", "Campaign", "folder_of", "source_digest"]

STATE = ROOT / ".bench-gpu"
FILE_LIMIT = 9_000_000  # bytes of a file in ``out``; of a longer one the end is kept
RESERVE = 5.0  # seconds kept for the table
OUT_OF_TIME = "out of time"
PROCESSES = 5  # of one stage, where each ends before its work does
GRACE = 2.0  # seconds between a stage's own deadline and its end by force
SOURCES = ("bench", "csrc", "dfkd_fast", "kernels", "tests")


@dataclass
class Campaign:
    """All stages on one device and commit; a later call goes on where this one ends.

    Args:
        stages: in their order.
        folder: keeps the records from one call to the next.
        out: gets a copy of the files after every stage, and every second.
        commit, command, data_root: see :class:`~bench.gpu.context.Context`.
        rehearse: on a CPU, at toy size.
        variables: of the stages' environment, beside this process's.
        log: told a line whenever something begins or ends.
    """

    stages: Sequence[Stage]
    folder: Path
    out: Path
    commit: str = "unknown"
    command: str = ""
    data_root: Path | None = None
    rehearse: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)
    log: Callable[[str], None] = print
    records: list[Record] = field(default_factory=list)
    """Of this call and, for the same commit and device, of earlier ones."""
    troubles: list[str] = field(default_factory=list)
    """What went wrong outside the stages, such as a full disk."""

    def run(self, minutes: float, chosen: Sequence[str] = ()) -> list[str]:
        """Run what is not done yet, or the chosen stages: one that was done begins anew.

        Returns:
            The lines of the final table.
        """
        end = time.monotonic() + 60 * minutes - RESERVE
        self._prepare_folders()
        self.records = self._load()
        done = records.stages_done(self.records)
        with _stopped_by_signals():
            try:
                for stage in self.stages:
                    if chosen and stage.name not in chosen:
                        continue
                    if stage.name in done:
                        if not chosen:
                            self.log(f"{stage.name}: done in an earlier call")
                            continue
                        self.records = [record for record in self.records if record.stage != stage.name]
                    self._run(stage, end)
            except KeyboardInterrupt:
                self.troubles.append("interrupted: what was recorded until then is here")
        lines = summary.lines(self.records, [stage.name for stage in self.stages], self.troubles)
        self._write("summary.txt", "\n".join(lines) + "\n", mode="w")
        self._write("failures.txt", summary.failures(self.records), mode="w")
        self._mirror()
        return summary.lines(self.records, [stage.name for stage in self.stages], self.troubles)

    @property
    def failed(self) -> bool:
        """Whether anything failed, a stage was cut short by its limit, or a result could not be written."""
        return bool(self.troubles) or any(record.status in FAILURES for record in summary.latest(self.records))

    def _run(self, stage: Stage, end: float) -> None:
        limit = stage.rehearsal_limit if self.rehearse else stage.limit
        seconds = min(limit, end - time.monotonic() - GRACE)
        if seconds < min(stage.needs, limit):
            self._take(
                Record(stage.name, "", "left", f"{max(0, seconds):.0f} s are left, and it needs {stage.needs:.0f}: the next call runs it")
            )
            return
        self.log(f"{stage.name}: at most {seconds:.0f} s")
        begin, deadline = time.monotonic(), time.monotonic() + seconds
        earlier, self._ended = len(self.records), False
        for _ in range(PROCESSES):
            self._running = ""
            settled = {record.case for record in self.records[earlier:]} | records.cases_done(self.records, stage.name)
            reason = self._process(stage, deadline - time.monotonic(), settled)
            if self._running:
                self._take(Record(stage.name, self._running, "failed", reason or "the process ended here", self._log_end))
            if self._ended or (reason is not None and reason.startswith(OUT_OF_TIME)) or deadline - time.monotonic() < stage.needs:
                break
        taken = round(time.monotonic() - begin, 2)
        if not self._ended:
            self._take(Record(stage.name, "", "failed", reason or "its process ended without a word", self._log_end, taken))
        self.log(f"{stage.name}: {summary.describe(self.records, stage.name)}, {taken:.0f} s")
        self._mirror()

    def _process(self, stage: Stage, seconds: float, settled: Collection[str]) -> str | None:
        """Run a stage, but for its settled cases, until it ends or its time is over; why it was cut short, or None."""
        reading, writing = os.pipe()
        job = {
            "stage": stage.name,
            "function": stage.function,
            "rehearse": self.rehearse,
            "seconds": seconds,
            "pipe": writing,
            "done": sorted(settled),
            "data_root": str(self.data_root) if self.data_root else "",
            "commit": self.commit,
            "command": self.command,
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.gpu.worker", json.dumps(job)],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **self.variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(writing,),
            start_new_session=True,
        )
        os.close(writing)
        assert process.stdout is not None
        self._write("log.txt", f"\n== {stage.name}\n")
        self._log_end = ""
        try:
            timed_out = self._listen(
                stage.name, process, {reading: self._record_lines, process.stdout.fileno(): self._log_text}, seconds + GRACE
            )
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started ends with it
            process.wait()
            os.close(reading)
            process.stdout.close()
        if timed_out:
            return f"{OUT_OF_TIME}: stopped after {seconds:.0f} s"
        if process.returncode < 0:
            return f"its process was killed by {signal.Signals(-process.returncode).name}"
        if process.returncode == RESTART:
            return "the GPU was lost to its process"
        return None if process.returncode == 0 else f"its process ended with exit code {process.returncode}"

    def _listen(
        self, name: str, process: subprocess.Popen[bytes], handlers: dict[int, Callable[[str, bytes], None]], seconds: float
    ) -> bool:
        """Hand on what a process writes until it ends; whether its time was over first."""
        deadline, mirrored = time.monotonic() + seconds, time.monotonic()
        with selectors.DefaultSelector() as selector:
            for descriptor, handler in handlers.items():
                os.set_blocking(descriptor, False)
                selector.register(descriptor, selectors.EVENT_READ, handler)
            self._rest = b""
            while True:
                ended = process.poll() is not None
                for key, _ in selector.select(0 if ended else 0.2):
                    data = os.read(key.fd, 1 << 16)
                    key.data(name, data)
                    if not data:
                        selector.unregister(key.fd)
                # A process that it left behind may keep its output open, and write for ever.
                if ended and (not selector.get_map() or not selector.select(0) or time.monotonic() > deadline):
                    return False
                if not ended and time.monotonic() > deadline:
                    return True
                if time.monotonic() > mirrored + 1:
                    self._mirror()
                    mirrored = time.monotonic()

    def _record_lines(self, name: str, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in filter(None, lines):
            try:
                if line.startswith(b'{"begun"'):
                    self._running = json.loads(line)["begun"]
                    continue
                record = records.parse(line.decode())
                self._running = "" if record.case == self._running else self._running
                self._ended |= not record.case
                self._take(record)
            except (TypeError, ValueError) as error:
                self.troubles.append(f"{name} sent what is not a record: {error}")

    def _log_text(self, _: str, data: bytes) -> None:
        text = data.decode(errors="replace")
        self._log_end = (self._log_end + text)[-4000:]
        self._write("log.txt", text)

    def _take(self, record: Record) -> None:
        self.records.append(record)
        self._write("results.jsonl", record.line() + "\n")

    def _write(self, name: str, text: str, mode: str = "a") -> None:
        """Write to a file of the folder; what cannot be written is in the final table all the same."""
        try:
            with (self.folder / name).open(mode) as file:
                file.write(text)
        except OSError as error:
            self._trouble(f"{self.folder / name} cannot be written: {error.strerror}")

    def _mirror(self) -> None:
        """Copy what has grown to ``out``."""
        for name in ("results.jsonl", "log.txt", "failures.txt", "summary.txt"):
            source, target = self.folder / name, self.out / name
            try:
                data = _end(source)
                if not target.exists() or target.stat().st_size != len(data) or name == "summary.txt":
                    target.write_bytes(data)
            except FileNotFoundError:
                continue
            except OSError as error:
                self._trouble(f"{target} cannot be written: {error.strerror}")

    def _trouble(self, text: str) -> None:
        if text not in self.troubles:
            self.troubles.append(text)

    def _prepare_folders(self) -> None:
        for folder in (self.folder, self.out):
            folder.mkdir(parents=True, exist_ok=True)

    def _load(self) -> list[Record]:
        try:
            return records.read(self.folder / "results.jsonl")
        except (OSError, TypeError, ValueError) as error:
            self._trouble(f"{self.folder / 'results.jsonl'} cannot be read: {error}")
            return []


def source_digest() -> str:
    """Of all that a stage runs: another state of it is another campaign, whether it is committed or not."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".cpp", ".h", ".toml") and path.is_file():
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def folder_of(device_name: str) -> Path:
    """Where the state of a device and of the sources as they are is kept."""
    return STATE / f"{re.sub(r'[^a-z0-9]+', '-', device_name.lower()).strip('-')}-{source_digest()}"


def _end(path: Path) -> bytes:
    data = path.read_bytes()
    if len(data) <= FILE_LIMIT:
        return data
    end = data[-FILE_LIMIT:]
    return end[end.index(b"\n") + 1 :] if b"\n" in end else end


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM ends a stage as Ctrl-C does, so that the table is still printed."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
