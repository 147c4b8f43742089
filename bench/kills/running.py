"""Kills runs, each in its own process, resumes them until they end by themselves, and compares the results."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from dfkd_fast.errors import DfkdError

from ..gpu.process import CLEARED
from ..provenance import ROOT
from .child import AtCall, Call, Order
from .trials import CONFIGURATIONS, AtTime, Done, Kill, Result, Trial
from .verdict import Reference, Verdict, contents, judge

__all__ = ["finish", "references", "run_all", "try_kill"]

EARLIER = 0.7  # factor of a kill's time, if the run had ended before it
TRIES = 6
HANG_FACTOR = 20.0  # a process that takes this many times the reference's time hangs


def finish(changes: tuple[str, ...], folder: Path) -> Done:
    """Run the recipe digits without killing it; returns its reference results.

    Args:
        changes: values of ``--set``.
        folder: run folder to create; it is kept.

    Raises:
        DfkdError: The run fails.
    """
    record = folder.with_name(f"{folder.name}.json")
    ending = _start(_arguments(changes, folder), Order(str(folder), 0, str(record), None), None, None)
    if ending.code != 0:
        raise DfkdError(f"the uninterrupted run ends with code {ending.code}: {ending.errors.strip()}")
    recorded = json.loads(record.read_text())
    return Done(changes, Reference.of(folder), tuple(Call(*call) for call in recorded["calls"]), recorded["seconds"])


def references(folder: Path) -> dict[str, Done]:
    """Run every configuration twice without killing it; returns the second runs, which do not compile anything.

    Args:
        folder: folder for the run folders.

    Raises:
        DfkdError: A run fails, or is not reproducible, so that no trial could be compared with it.
    """
    done = {}
    for name, changes in CONFIGURATIONS.items():
        finish(changes, folder / f"{name}-first")
        done[name] = finish(changes, folder / name)
        if differences := done[name].reference.differences(folder / f"{name}-first"):
            raise DfkdError(f"{name}: two uninterrupted runs differ: {'; '.join(differences)}")
    return done


def try_kill(trial: Trial, done: Done, folder: Path) -> Result:
    """Kill a run, resume it until it ends by itself, and compare its files with the reference; returns the result.

    Args:
        trial: the kills.
        done: the uninterrupted run.
        folder: run folder to create; it is kept.
    """
    begin = time.perf_counter()
    first, *others = trial.kills
    struck: list[str] = []
    before, newest, ending = {}, "", None
    for _ in range(TRIES):
        ending = _attempt(folder, first, done)
        # The run was faster than the reference, and ended before its kill.
        if ending.code != 0 or not isinstance(first, AtTime):
            break
        first = replace(first, fraction=first.fraction * EARLIER)
        shutil.rmtree(folder)
    if ending is None or not ending.struck:
        verdict = Verdict("FAILED", f"the run ended before the kill {first}, with code {ending.code if ending else 0}")
        return Result(trial, (), "", verdict, time.perf_counter() - begin)
    struck.append(str(first))
    for kill in (*others, None):
        before, newest = contents(folder), _newest(folder)
        ending = _attempt(folder, kill, done)
        if not ending.struck:
            break
        struck.append(str(kill))
    verdict = judge(ending.code, ending.errors, before, folder, done.reference)
    return Result(trial, tuple(struck), newest, verdict, time.perf_counter() - begin)


def run_all(trials: Sequence[Trial], done: Mapping[str, Done], folder: Path, jobs: int, on_result: Callable[[Result], None]) -> None:
    """Run trials in parallel.

    Args:
        trials: trials to run.
        done: uninterrupted runs, by configuration.
        folder: folder for the run folders; those of failed trials are kept.
        jobs: number of concurrent trials.
        on_result: called with each result as soon as it is known.
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


@dataclass(frozen=True)
class _Ending:
    code: int
    errors: str
    struck: bool


def _attempt(folder: Path, kill: Kill | None, done: Done) -> _Ending:
    """Start the run, or resume it if the folder holds one."""
    arguments = [*_arguments(done.changes, folder), *(["--resume"] if (folder / "recipe.toml").is_file() else [])]
    order = Order(str(folder), 0, "", kill if isinstance(kill, AtCall) else None)
    return _start(arguments, order, kill if isinstance(kill, AtTime) else None, done)


def _arguments(changes: Sequence[str], folder: Path) -> list[str]:
    return ["distill", "digits", "--device", "cpu", "--out", str(folder), *(text for change in changes for text in ("--set", change))]


def _start(arguments: Sequence[str], order: Order, moment: AtTime | None, done: Done | None) -> _Ending:
    limit = 600.0 if done is None else 60.0 + HANG_FACTOR * done.seconds
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
    """Kill the process at a moment; returns whether it was still running."""
    total, event = (done.seconds, b"start\n") if moment.of == "run" else (done.teacher_seconds, b"teacher\n")
    for line in _lines(pipe, limit):
        if line == event:
            try:
                process.wait(moment.fraction * total)
            except subprocess.TimeoutExpired:
                process.kill()
                return True
            return False
    return False


def _lines(pipe: int, limit: float) -> Iterator[bytes]:
    """Yield the lines of a pipe until it is closed or the time limit is reached."""
    deadline, rest = time.monotonic() + limit, b""
    while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0] and (data := os.read(pipe, 100)):
        *lines, rest = (rest + data).split(b"\n")
        yield from (line + b"\n" for line in lines)


def _environment() -> dict[str, str]:
    """Return this process's environment with one thread, because the number of threads affects rounding, and bits are compared."""
    kept = {name: value for name, value in os.environ.items() if name not in CLEARED}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def _newest(folder: Path) -> str:
    states = [*sorted(folder.glob("checkpoints/iteration-*.pt"))[-1:], folder / "teacher.safetensors"]
    states += [*sorted(folder.glob("checkpoints/teacher/iteration-*.pt"))[-1:], folder / "recipe.toml"]
    return next((str(path.relative_to(folder)) for path in states if path.is_file()), "")
