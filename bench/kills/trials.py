"""Trials: a small run is killed once or twice at points of a seeded random stream, resumed, and judged."""

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from dfkd_fast.errors import DfkdError
from dfkd_fast.files import replacing

from .. import table
from ..gpu.process import CLEARED
from ..provenance import ROOT
from .child import RUN_BEGINS, STAGES, AtCall, Call, Order
from .verdict import Outcome, Reference, Verdict, contents, judge

__all__ = [
    "CONFIGURATIONS",
    "AtTime",
    "Done",
    "Result",
    "Row",
    "Trial",
    "draw",
    "finish",
    "references",
    "rows",
    "run_all",
    "try_kill",
    "write",
]

SMALL = ("teacher.epochs=6", "loop.epochs=4", "loop.iterations_per_epoch=3", "report.samples_every=2")
CONFIGURATIONS: dict[str, tuple[str, ...]] = {
    "ema_generator": SMALL,  # MAD, Adam and cosine schedules, as digits has it
    "memory_bank": (
        *SMALL,
        *("replay.kind=memory_bank", "replay.rows=16", "replay.memory_bank.every=1", "update.kind=pooled", "loop.batch_size=48"),
        *("loop.student_ema_decay=0.9", "loop.drift_samples=16", "teacher.augment=shift", "student_optimizer.kind=sgd"),
    ),
}
"""What ``--set`` makes of the recipe digits; together they have all kinds of state that a checkpoint keeps on a CPU, but the VAE's."""
TEACHER_FILES = ("teacher checkpoint", "teacher.safetensors")
SECOND_KILLS = 0.25  # of the trials have one
SOONER = 0.7  # of its time, where a kill came after the end
TRIES = 6
SLOWNESS = 20.0  # times the reference's seconds after which a process hangs
Kind = Literal["time", "write", "teacher"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class AtTime:
    """A moment at which the process is killed from outside, wherever it is."""

    fraction: float
    """Of the reference's seconds: of the whole run, or of its teacher's training."""
    of: Literal["run", "teacher"]

    def __str__(self) -> str:
        return f"after {self.fraction:.0%} of the {self.of}'s seconds"


Kill = AtCall | AtTime


@dataclass(frozen=True)
class Trial:
    """A run of a configuration, and its kills: the first of the run, the second of the resumed one."""

    number: int
    kind: Kind
    configuration: str
    kills: tuple[Kill, ...]


@dataclass(frozen=True)
class Done:
    """A run that was never killed."""

    changes: tuple[str, ...]
    """What ``--set`` made of the recipe digits."""
    reference: Reference
    calls: tuple[Call, ...]
    """Its file operations."""
    seconds: float
    """Without the imports."""

    @property
    def teacher_seconds(self) -> float:
        """From the beginning of the teacher's training until its weights are there."""
        begin = next(call.seconds for call in self.calls if (call.file, call.call) == RUN_BEGINS)
        return max(call.seconds for call in self.calls if call.file == "teacher.safetensors") - begin


@dataclass(frozen=True)
class Result:
    """A trial and its verdict."""

    trial: Trial
    kills: tuple[str, ...]
    """That struck. A second one does not where the resumed run has no such point, or refuses."""
    found: str
    """What the last kill left: the newest of the files that a run goes on from; empty for none."""
    verdict: Verdict
    seconds: float

    def __str__(self) -> str:
        trial, why = self.trial, f" ({self.verdict.why})" if self.verdict.why else ""
        kills = ", then ".join(self.kills) or "not killed"
        return f"trial {trial.number}, {trial.configuration}, {kills}: {self.verdict.outcome}{why}"

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        trial = asdict(self.trial) | {"kills": [{"point": str(kill)} | asdict(kill) for kill in self.trial.kills]}
        return trial | {"struck": list(self.kills), "found": self.found, **asdict(self.verdict), "seconds": round(self.seconds, 1)}


@dataclass(frozen=True)
class Row:
    """Trials of a kind."""

    kill: str
    """Kind and file of the first kill."""
    trials: int
    killed_twice: int
    identical: int
    refused: int
    failed: int


def finish(changes: tuple[str, ...], folder: Path) -> Done:
    """Distil the digits without killing the run.

    Args:
        changes: for ``--set``.
        folder: of the run, which must not exist; it is kept.

    Raises:
        DfkdError: the run fails.
    """
    record = folder.with_name(f"{folder.name}.json")
    ending = _start(_arguments(changes, folder), Order(str(folder), 0, str(record), None), None, None)
    if ending.code != 0:
        raise DfkdError(f"the run that is not killed ends with code {ending.code}: {ending.errors.strip()}")
    recorded = json.loads(record.read_text())
    return Done(changes, Reference.of(folder), tuple(Call(*call) for call in recorded["calls"]), recorded["seconds"])


def references(folder: Path) -> dict[str, Done]:
    """Run every configuration twice without killing it; returns the second runs, for which everything was compiled.

    Args:
        folder: takes the runs in.

    Raises:
        DfkdError: a run fails, or is not repeatable, in which case no trial could say anything.
    """
    found = {}
    for name, changes in CONFIGURATIONS.items():
        finish(changes, folder / f"{name}-first")
        found[name] = finish(changes, folder / name)
        if differences := found[name].reference.differences(folder / f"{name}-first"):
            raise DfkdError(f"{name}: two runs that are not killed are not the same: {'; '.join(differences)}")
    return found


def draw(seed: int, number: int, done: Mapping[str, Done]) -> Trial:
    """A trial by its number, the same whatever others are drawn: half of them at random times, a quarter each at writes and the teacher.

    Args:
        seed: of the streams of random numbers; each trial has its own.
        number: from 0.
        done: runs that were never killed, by configuration.
    """
    stream = random.Random(f"{seed} {number}")
    kind = KINDS[(0, 1, 0, 2)[number % 4]]
    name = list(done)[number // 4 % len(done)]
    calls = done[name].calls
    if kind == "write":
        first: Kill = _draw_call(stream, [call for call in calls if call.file not in TEACHER_FILES])
    elif kind == "teacher" and stream.random() < 0.5:
        first = _draw_call(stream, [call for call in calls if call.file in TEACHER_FILES])
    else:
        first = AtTime(round(stream.random(), 4), "teacher" if kind == "teacher" else "run")
    if stream.random() >= SECOND_KILLS:
        return Trial(number, kind, name, (first,))
    if stream.random() < 0.5:
        return Trial(number, kind, name, (first, AtTime(round(stream.random() / 2, 4), "run")))
    return Trial(number, kind, name, (first, replace(_draw_call(stream, calls), number=1)))


def try_kill(trial: Trial, done: Done, folder: Path) -> Result:
    """Kill a run, resume it until it ends by itself, and judge what it left.

    Args:
        trial: which kills.
        done: the run that was never killed.
        folder: of the new one, which must not exist; it is kept.
    """
    begin = time.perf_counter()
    first, *others = trial.kills
    struck: list[str] = []
    before, found, ending = {}, "", None
    for _ in range(TRIES):
        ending = _attempt(folder, first, done)
        # Another machine, or this one at another time, is faster than the reference: the run ended before its kill.
        if ending.code != 0 or not isinstance(first, AtTime):
            break
        first = replace(first, fraction=first.fraction * SOONER)
        shutil.rmtree(folder)
    if ending is None or not ending.struck:
        verdict = Verdict("FAILED", f"the run ended before the kill {first}, with code {ending.code if ending else 0}")
        return Result(trial, (), "", verdict, time.perf_counter() - begin)
    struck.append(str(first))
    for kill in (*others, None):
        before, found = contents(folder), _newest(folder)
        ending = _attempt(folder, kill, done)
        if not ending.struck:
            break
        struck.append(str(kill))
    verdict = judge(ending.code, ending.errors, before, folder, done.reference)
    return Result(trial, tuple(struck), found, verdict, time.perf_counter() - begin)


def run_all(trials: Sequence[Trial], done: Mapping[str, Done], folder: Path, jobs: int, on_result: Callable[[Result], None]) -> None:
    """Run trials, so many at a time.

    Args:
        trials: what is tried.
        done: runs that were never killed, by configuration.
        folder: takes the runs in; those that failed stay there.
        jobs: how many at a time.
        on_result: told each result as soon as it is known.
    """

    def run(trial: Trial) -> Result:
        path = folder / f"trial-{trial.number}"
        result = try_kill(trial, done[trial.configuration], path)
        if result.verdict.outcome != "FAILED":
            shutil.rmtree(path, ignore_errors=True)
        return result

    executor = ThreadPoolExecutor(jobs)
    try:
        for future in as_completed([executor.submit(run, trial) for trial in trials]):
            on_result(future.result())
    finally:
        executor.shutdown(cancel_futures=True)


def rows(results: Sequence[Result]) -> list[Row]:
    """The table: a row for each kind of kill and file, in the order of kinds, and one for all."""
    groups: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: (KINDS.index(result.trial.kind), _label(result.trial))):
        groups.setdefault(_label(result.trial), []).append(result)
    return [_row(label, group) for label, group in groups.items()] + [_row("all", results)]


def write(folder: Path, origin: Mapping[str, object], results: Sequence[Result]) -> None:
    """Write kills.json, a record a trial, and kills.csv, the table.

    Args:
        folder: takes the files in.
        origin: where and with what the trials ran.
        results: of the trials so far, in any order.
    """
    ordered = [result.to_dict() for result in sorted(results, key=lambda result: result.trial.number)]
    with replacing(folder / "kills.json") as part:
        part.write_text(json.dumps({"origin": dict(origin), "trials": ordered}, indent=1) + "\n")
    table.write_anew(folder / "kills.csv", rows(results))


def _row(label: str, group: Sequence[Result]) -> Row:
    count: Counter[Outcome] = Counter(result.verdict.outcome for result in group)
    twice = sum(len(result.kills) > 1 for result in group)
    return Row(label, len(group), twice, count["identical"], count["refused"], count["FAILED"])


def _label(trial: Trial) -> str:
    first = trial.kills[0]
    where = first.file if isinstance(first, AtCall) else "random time"
    return f"{trial.kind}: {where}" if trial.kind != "time" else where


def _draw_call(stream: random.Random, calls: Sequence[Call]) -> AtCall:
    """Files first, then calls: there are many more writes of pictures than of anything else."""
    file = stream.choice(sorted({call.file for call in calls}))
    call = stream.choice(sorted({call.call for call in calls if call.file == file}))
    number = stream.randint(1, sum((one.file, one.call) == (file, call) for one in calls))
    return AtCall(file, call, number, stream.choice(STAGES[call]))


@dataclass(frozen=True)
class _Ending:
    code: int
    errors: str
    struck: bool


def _attempt(folder: Path, kill: Kill | None, done: Done) -> _Ending:
    """Begin the run, or resume it where the folder holds one."""
    arguments = [*_arguments(done.changes, folder), *(["--resume"] if (folder / "recipe.toml").is_file() else [])]
    order = Order(str(folder), 0, "", kill if isinstance(kill, AtCall) else None)
    return _start(arguments, order, kill if isinstance(kill, AtTime) else None, done)


def _arguments(changes: Sequence[str], folder: Path) -> list[str]:
    return ["distill", "digits", "--device", "cpu", "--out", str(folder), *(text for change in changes for text in ("--set", change))]


def _start(arguments: Sequence[str], order: Order, moment: AtTime | None, done: Done | None) -> _Ending:
    limit = 600.0 if done is None else 60.0 + SLOWNESS * done.seconds
    folder = Path(order.folder)
    reading, writing = os.pipe()
    errors = folder.with_name(f"{folder.name}.stderr")
    with os.fdopen(reading, "rb", buffering=0) as pipe, errors.open("w+b") as file:
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "bench.kills.child", replace(order, ready=writing).to_json(), *arguments],
                cwd=folder.parent,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=file,
                pass_fds=(writing,),
            )
        finally:
            os.close(writing)
        try:
            killed_here = moment is not None and done is not None and _kill_at(process, pipe.fileno(), moment, done, limit)
            code = process.wait(limit)
            file.seek(0)
            text = file.read().decode(errors="replace")
        except subprocess.TimeoutExpired:
            code, killed_here, text = -signal.SIGALRM, False, f"out of time after {limit:.0f} s"
        finally:
            process.kill()
            process.wait()
    errors.unlink()
    return _Ending(code, text, code == -signal.SIGKILL and (killed_here or order.kill is not None))


def _kill_at(process: subprocess.Popen[bytes], pipe: int, moment: AtTime, done: Done, limit: float) -> bool:
    """Kill the process at a moment; returns whether it was still there."""
    whole, event = (done.seconds, b"start\n") if moment.of == "run" else (done.teacher_seconds, b"teacher\n")
    for said in _lines(pipe, limit):
        if said == event:
            try:
                process.wait(moment.fraction * whole)
            except subprocess.TimeoutExpired:
                process.kill()
                return True
            return False
    return False


def _lines(pipe: int, limit: float) -> Iterator[bytes]:
    """What comes through a pipe, line by line, until its other end is closed or the seconds are over."""
    deadline, rest = time.monotonic() + limit, b""
    while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0] and (data := os.read(pipe, 100)):
        *lines, rest = (rest + data).split(b"\n")
        yield from (line + b"\n" for line in lines)


def _environment() -> dict[str, str]:
    """This process's, with one thread: sums over threads are grouped by their number, and bits are compared."""
    kept = {name: value for name, value in os.environ.items() if name not in CLEARED}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def _newest(folder: Path) -> str:
    states = [*sorted(folder.glob("checkpoints/iteration-*.pt"))[-1:], folder / "teacher.safetensors"]
    states += [*sorted(folder.glob("checkpoints/teacher/iteration-*.pt"))[-1:], folder / "recipe.toml"]
    return next((str(path.relative_to(folder)) for path in states if path.is_file()), "")
