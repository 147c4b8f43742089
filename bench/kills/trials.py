"""Trials: runs to kill at seeded random points, and the table of their results.

``running.py`` kills and resumes them, ``child.py`` is the killed process, and ``verdict.py`` compares the results.
"""

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from dfkd_fast.files import replacing

from .. import table
from .child import RUN_BEGINS, STAGES, AtCall, Call
from .verdict import Outcome, Reference, Verdict

__all__ = ["CONFIGURATIONS", "AtTime", "Done", "Kill", "Result", "Row", "Trial", "draw", "rows", "write"]

SMALL = ("teacher.epochs=6", "loop.epochs=4", "loop.iterations_per_epoch=3", "report.samples_every=2")
CONFIGURATIONS: dict[str, tuple[str, ...]] = {
    "ema_generator": SMALL,  # MAD, Adam and cosine schedules, as in digits
    "memory_bank": (
        *SMALL,
        *("replay.kind=memory_bank", "replay.rows=16", "replay.memory_bank.every=1", "update.kind=pooled", "loop.batch_size=48"),
        *("loop.student_ema_decay=0.9", "loop.drift_samples=16", "teacher.augment=shift", "student_optimizer.kind=sgd"),
    ),
}
"""Overrides of the recipe digits. Together they cover all state of a checkpoint on a CPU, except the VAE's."""
TEACHER_FILES = ("teacher checkpoint", "teacher.safetensors")
SECOND_KILLS = 0.25  # fraction of the trials with a second kill
Kind = Literal["time", "write", "teacher"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class AtTime:
    """A moment at which the process is killed from outside."""

    fraction: float
    """Fraction of the reference's time, of the whole run or of the teacher's training."""
    of: Literal["run", "teacher"]

    def __str__(self) -> str:
        return f"after {self.fraction:.0%} of the {self.of}'s seconds"


Kill = AtCall | AtTime


@dataclass(frozen=True)
class Trial:
    """A run of a configuration, and its kills: the first one kills the run, the second one the resumed run."""

    number: int
    kind: Kind
    configuration: str
    kills: tuple[Kill, ...]


@dataclass(frozen=True)
class Done:
    """An uninterrupted run."""

    changes: tuple[str, ...]
    """Overrides of the recipe digits."""
    reference: Reference
    calls: tuple[Call, ...]
    """File operations of the run."""
    seconds: float
    """Duration without the imports."""

    @property
    def teacher_seconds(self) -> float:
        """Seconds from the start of the teacher's training until its weights are written."""
        begin = next(call.seconds for call in self.calls if (call.file, call.call) == RUN_BEGINS)
        return max(call.seconds for call in self.calls if call.file == "teacher.safetensors") - begin


@dataclass(frozen=True)
class Result:
    """A trial and its verdict."""

    trial: Trial
    kills: tuple[str, ...]
    """The kills that happened. A second one does not happen if the resumed run does not reach its point, or refuses."""
    newest_file: str
    """Newest file after the last kill from which a run can resume; empty if there is none."""
    verdict: Verdict
    seconds: float

    def __str__(self) -> str:
        trial, why = self.trial, f" ({self.verdict.why})" if self.verdict.why else ""
        kills = ", then ".join(self.kills) or "not killed"
        return f"trial {trial.number}, {trial.configuration}, {kills}: {self.verdict.outcome}{why}"

    def to_dict(self) -> dict[str, object]:
        """Return the result as a dictionary for JSON."""
        trial = asdict(self.trial) | {"kills": [{"point": str(kill)} | asdict(kill) for kill in self.trial.kills]}
        return trial | {
            "struck": list(self.kills),
            "newest_file": self.newest_file,
            **asdict(self.verdict),
            "seconds": round(self.seconds, 1),
        }


@dataclass(frozen=True)
class Row:
    """Results of the trials of one kind."""

    kill: str
    """Kind and file of the first kill."""
    trials: int
    killed_twice: int
    identical: int
    refused: int
    failed: int


def draw(seed: int, number: int, done: Mapping[str, Done]) -> Trial:
    """Return the trial with a number, which does not depend on other trials.

    Half of the trials kill at random times, a quarter at file writes, and a quarter during the teacher's training.

    Args:
        seed: seed of the random numbers.
        number: number of the trial, from 0.
        done: uninterrupted runs, by configuration.
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


def rows(results: Sequence[Result]) -> list[Row]:
    """Return a row for each kind of kill and file, in the order of the kinds, and one for all trials."""
    groups: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: (KINDS.index(result.trial.kind), _label(result.trial))):
        groups.setdefault(_label(result.trial), []).append(result)
    return [_row(label, group) for label, group in groups.items()] + [_row("all", results)]


def write(folder: Path, origin: Mapping[str, object], results: Sequence[Result]) -> None:
    """Write kills.json, with a record per trial, and kills.csv, the table.

    Args:
        folder: output folder.
        origin: provenance of the trials.
        results: results of the trials so far, in any order.
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
    """Draw the file first, then the call, because most calls are writes of images."""
    file = stream.choice(sorted({call.file for call in calls}))
    call = stream.choice(sorted({call.call for call in calls if call.file == file}))
    number = stream.randint(1, sum((one.file, one.call) == (file, call) for one in calls))
    return AtCall(file, call, number, stream.choice(STAGES[call]))
