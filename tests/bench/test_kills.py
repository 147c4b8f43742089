"""Runs that are killed and resumed: a few trials as in ``python -m bench kills``, on a minimal run."""

import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.__main__ import main
from bench.kills import running, trials
from bench.kills.child import STAGES, AtCall, Call, Order, file_kind
from bench.kills.running import finish, try_kill
from bench.kills.trials import AtTime, Done, Result, Trial, draw, rows
from bench.kills.verdict import Reference, Verdict, contents, judge
from bench.provenance import ROOT

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="requires Linux")

TINY = ("teacher.epochs=2", "loop.epochs=2", "loop.iterations_per_epoch=1", "loop.student_steps=1", "report.samples=4")

# The kinds of writes of a run: through a temporary file, and appending lines.
WRITER = """
import os, sys
from pathlib import Path
from bench.kills.child import AtCall, Watch
folder = Path(sys.argv[1])
Watch(str(folder), AtCall(*eval(sys.argv[2]))).install()
part = folder / ".summary.part.json"
part.write_bytes(b"0123456789")
with part.open("rb+") as file:
    os.fsync(file.fileno())
part.replace(folder / "summary.json")
part.unlink(missing_ok=True)
with (folder / "metrics.jsonl").open("a") as file:
    file.write("first\\n")
    file.write("second\\n")
descriptor = os.open(folder / "recipe.toml", os.O_WRONLY | os.O_CREAT)
os.write(descriptor, b"abcd")
"""
OLD, NEW, PART = {"summary.json": "old"}, {"summary.json": "0123456789"}, ".summary.part.json"


@pytest.mark.parametrize(
    ("kill", "left"),
    [
        (("summary.json", "write", 1, "before"), OLD | {PART: ""}),
        (("summary.json", "write", 1, "middle"), OLD | {PART: "01234"}),
        (("summary.json", "write", 1, "after"), OLD | {PART: "0123456789"}),
        (("summary.json", "fsync", 1, "before"), OLD | {PART: "0123456789"}),
        (("summary.json", "replace", 1, "before"), OLD | {PART: "0123456789"}),
        (("summary.json", "replace", 1, "after"), NEW),
        (("summary.json", "unlink", 1, "after"), NEW),
        (("metrics.jsonl", "write", 2, "middle"), NEW | {"metrics.jsonl": "first\nsec"}),
        (("metrics.jsonl", "write", 2, "after"), NEW | {"metrics.jsonl": "first\nsecond\n"}),
        (("recipe.toml", "write", 1, "middle"), NEW | {"metrics.jsonl": "first\nsecond\n", "recipe.toml": "ab"}),
    ],
)
def test_a_process_is_killed_at_the_given_call_and_stage(kill: tuple[str, str, int, str], left: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("old")
    ended = subprocess.run([sys.executable, "-c", WRITER, str(tmp_path), repr(kill)], cwd=ROOT, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == left


def test_a_process_without_the_given_call_is_not_killed(tmp_path: Path) -> None:
    kill = ("metrics.jsonl", "write", 3, "before")
    ended = subprocess.run([sys.executable, "-c", WRITER, str(tmp_path), repr(kill)], cwd=ROOT, check=False)
    assert ended.returncode == 0
    assert (tmp_path / "recipe.toml").read_text() == "abcd"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/run/checkpoints/iteration-00000003.pt", "checkpoint"),
        ("/run/checkpoints/.iteration-00000003.part.pt", "checkpoint"),
        ("/run/checkpoints/teacher/.iteration-00000003.part.pt", "teacher checkpoint"),
        ("/run/.teacher.part.safetensors", "teacher.safetensors"),
        ("/run/student-best-on-test.safetensors", "student-best-on-test.safetensors"),
        ("/run/.student.part.safetensors", "student.safetensors"),
        ("/run/.recipe.part.toml", "recipe.toml"),
        ("/run/tensorboard/events.out.tfevents.17.vm.1", "tensorboard"),
        ("/run/samples/epoch-0002.png", "png"),
        ("/run/run.lock", "other"),
        ("/run-2/recipe.toml", None),
        ("/recipe.toml", None),
    ],
)
def test_a_temporary_file_counts_as_what_it_becomes_and_files_outside_the_run_do_not_count(path: str, kind: str | None) -> None:
    assert file_kind("/run", path) == kind


@pytest.mark.parametrize("kill", [None, AtCall("checkpoint", "write", 2, "middle")])
def test_an_order_reaches_the_process_unchanged(kill: AtCall | None) -> None:
    order = Order("/run", 7, "/run.json", kill)
    assert Order.from_json(order.to_json()) == order


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A small run folder."""
    folder = tmp_path / "run"
    for name in ("checkpoints", "tensorboard", "samples"):
        (folder / name).mkdir(parents=True)
    for name in ("student", "teacher"):
        save_file({"weight": torch.arange(4.0), "bias": torch.zeros(1)}, folder / f"{name}.safetensors", {"seconds": "1.5"})
    (folder / "recipe.toml").write_text("seed = 0\n")
    (folder / "metrics.jsonl").write_text('{"epoch": 1, "seconds": 1.5, "losses": {"student": 0.5}}\n')
    (folder / "summary.json").write_text('{"teacher_accuracy": 70.0, "seconds": {"total": 3.5}, "peak_memory_bytes": 5}\n')
    (folder / "samples" / "epoch-0001.png").write_bytes(b"image")
    (folder / "checkpoints" / "iteration-00000009.pt").write_bytes(b"state")
    (folder / "tensorboard" / "events.out.tfevents.17.vm.1").write_bytes(b"events")
    return folder


def set_weight(path: Path, value: float) -> None:
    tensors = load_file(path)
    tensors["weight"][0] = value
    save_file(tensors, path)


def test_measured_values_and_files_that_a_kill_may_leave_are_not_differences(run_folder: Path) -> None:
    reference = Reference.of(run_folder)
    save_file({"weight": torch.arange(4.0), "bias": torch.zeros(1)}, run_folder / "teacher.safetensors", {"seconds": "2.5"})
    (run_folder / "metrics.jsonl").write_text('{"epoch": 1, "seconds": 9.5, "losses": {"student": 0.5}}\n')
    (run_folder / "summary.json").write_text('{"teacher_accuracy": 70.0, "seconds": {"total": 9.5}, "peak_memory_bytes": 6}\n')
    (run_folder / "tensorboard" / "events.out.tfevents.18.vm.2").write_bytes(b"more")
    (run_folder / "checkpoints" / "iteration-00000003.pt").write_bytes(b"older")
    assert judge(0, "a warning\nor two\n", {}, run_folder, reference) == Verdict("identical")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda run: set_weight(run / "student.safetensors", 1e-7), "student.safetensors differs"),
        (lambda run: set_weight(run / "teacher.safetensors", 1e-7), "teacher.safetensors differs"),
        (lambda run: (run / "metrics.jsonl").write_text('{"epoch": 1, "losses": {"student": 0.6}}\n'), "metrics.jsonl differs"),
        (lambda run: (run / "metrics.jsonl").write_text(2 * (run / "metrics.jsonl").read_text()), "metrics.jsonl differs"),
        (lambda run: (run / "summary.json").write_text('{"teacher_accuracy": 70.1}'), "summary.json differs"),
        (lambda run: (run / "recipe.toml").write_text("seed = 1\n"), "recipe.toml differs"),
        (lambda run: (run / "samples" / "epoch-0001.png").write_bytes(b"another"), "samples/epoch-0001.png differs"),
        (lambda run: (run / "summary.json").unlink(), "summary.json is missing"),
        (lambda run: (run / "checkpoints" / "iteration-00000009.pt").unlink(), "checkpoints/iteration-00000009.pt is missing"),
        (lambda run: (run / ".student.part.safetensors").write_bytes(b"half"), ".student.part.safetensors is left over"),
        (
            lambda run: (run / "checkpoints" / ".iteration-00000009.part.pt").write_bytes(b"half"),
            "checkpoints/.iteration-00000009.part.pt is left over",
        ),
        (lambda run: (run / "metrics.jsonl").write_text('{"epoch": 1, "lo'), "a file cannot be read: JSONDecodeError"),
        (lambda run: (run / "student.safetensors").write_bytes(b"half"), "a file cannot be read: SafetensorError"),
        (shutil.rmtree, "is missing"),
    ],
)
def test_a_run_that_differs_from_the_reference_fails_and_the_verdict_names_the_file(
    damage: Callable[[Path], object], why: str, run_folder: Path
) -> None:
    reference = Reference.of(run_folder)
    damage(run_folder)
    verdict = judge(0, "", {}, run_folder, reference)
    assert verdict.outcome == "FAILED"
    assert why in verdict.why


def test_a_refusal_is_one_line_with_exit_code_2_and_changes_no_file(run_folder: Path) -> None:
    reference, before = Reference.of(run_folder), contents(run_folder)
    line = "dfkd-fast: checkpoint cannot be read\n"
    assert judge(2, line, before, run_folder, reference) == Verdict("refused", line.strip())
    for code, errors in ((1, line), (2, ""), (2, f"Traceback\n{line}"), (130, line), (-signal.SIGKILL, ""), (-signal.SIGSEGV, line)):
        assert judge(code, errors, before, run_folder, reference).outcome == "FAILED"
    (run_folder / "summary.json").write_text("{}")
    assert judge(2, line, before, run_folder, reference) == Verdict("FAILED", "refused, but summary.json lost or changed")
    (run_folder / "summary.json").unlink()
    assert judge(2, line, before, run_folder, reference).outcome == "FAILED"


def test_a_run_killed_in_its_teachers_training_at_its_weights_and_in_a_checkpoint_ends_identical(tmp_path: Path) -> None:
    done = finish(TINY, tmp_path / "uninterrupted")
    kills = (
        AtTime(0.0, "teacher"),
        AtCall("teacher.safetensors", "replace", 1, "before"),
        AtCall("checkpoint", "write", 2, "middle"),
    )
    result = try_kill(Trial(0, "teacher", "tiny", kills), done, tmp_path / "run")
    assert result.verdict == Verdict("identical")
    assert result.kills == tuple(map(str, kills))
    assert result.newest_file == "checkpoints/iteration-00000001.pt"
    # A reference with other weights is detected as different.
    other = replace(done.reference, hashes={**done.reference.hashes, "student.safetensors": "0"})
    assert judge(0, "", {}, tmp_path / "run", other) == Verdict("FAILED", "student.safetensors differs")


@pytest.mark.parametrize("kill", [AtCall("checkpoint", "write", 99, "middle"), AtTime(0.5, "run")])
def test_a_trial_whose_run_ended_before_its_kill_fails(kill: AtCall | AtTime, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(arguments: Sequence[str], *_: object) -> running._Ending:
        Path(arguments[arguments.index("--out") + 1]).mkdir(exist_ok=True)
        return running._Ending(0, "", struck=False)

    done = replace(invented(), reference=Reference.of(run_folder))
    monkeypatch.setattr(running, "_start", end)
    result = try_kill(Trial(0, "write", "tiny", (kill,)), done, run_folder)
    assert result.verdict.outcome == "FAILED"
    assert "ended before the kill" in result.verdict.why
    assert result.kills == ()


def invented(files: tuple[str, ...] = ("recipe.toml", "teacher checkpoint", "teacher.safetensors", "checkpoint", "summary.json")) -> Done:
    calls = [Call(float(number), file, call) for number, file in enumerate(files) for call in STAGES for _ in range(2)]
    return Done((), Reference({}, frozenset()), tuple(calls), 10.0)


def test_a_trial_can_be_repeated_by_its_number_and_other_seeds_give_other_trials() -> None:
    references = {"one": invented(), "two": invented()}
    drawn = [draw(0, number, references) for number in range(40)]
    assert draw(0, 17, references) == drawn[17]
    assert [draw(1, number, references) for number in range(40)] != drawn


def test_half_of_the_trials_target_writes_and_the_teacher_and_all_points_exist_in_the_run() -> None:
    references = {"one": invented(), "two": invented()}
    drawn = [draw(0, number, references) for number in range(400)]
    assert Counter(trial.kind for trial in drawn) == {"time": 200, "write": 100, "teacher": 100}
    assert {(trial.kind, trial.configuration) for trial in drawn} == {(kind, name) for kind in trials.KINDS for name in references}
    first = [trial.kills[0] for trial in drawn]
    known = {(call.file, call.call) for call in references["one"].calls}
    at_calls = [kill for kill in first if isinstance(kill, AtCall)]
    assert {(kill.file, kill.call) for kill in at_calls} == known
    assert all(kill.number in (1, 2) and kill.stage in STAGES[kill.call] for kill in at_calls)
    assert {len(trial.kills) for trial in drawn} == {1, 2}


def result_of(number: int, kill: AtCall | AtTime, verdict: Verdict) -> Result:
    kind = "write" if isinstance(kill, AtCall) else "time"
    return Result(Trial(number, kind, "one", (kill,)), (str(kill),), "", verdict, 1.0)  # type: ignore[arg-type]


def test_the_table_counts_verdicts_by_kind_of_kill() -> None:
    write, moment = AtCall("recipe.toml", "write", 1, "before"), AtTime(0.5, "run")
    verdicts = [Verdict("identical"), Verdict("refused", "a line"), Verdict("FAILED", "a reason")]
    results = [result_of(number, write, verdict) for number, verdict in enumerate(verdicts)] + [result_of(3, moment, verdicts[0])]
    assert [(row.kill, row.trials, row.identical, row.refused, row.failed) for row in rows(results)] == [
        ("random time", 1, 1, 0, 0),
        ("write: recipe.toml", 3, 1, 1, 1),
        ("all", 4, 2, 1, 1),
    ]


@pytest.mark.parametrize(("verdict", "code"), [(Verdict("FAILED", "summary.json is missing"), 1), (Verdict("refused", "a line"), 0)])
def test_the_command_fails_if_any_trial_does_and_writes_every_trial(
    verdict: Verdict, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def give(trial: Trial, done: Done, folder: Path) -> Result:
        folder.mkdir()
        return Result(trial, ("somewhere",), "", verdict if trial.number == 2 else Verdict("identical"), 1.0)

    monkeypatch.setattr(running, "references", lambda folder: {"one": invented()})
    monkeypatch.setattr(running, "try_kill", give)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["bench", "kills", "--count", "4", "--jobs", "2", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code or 0) == code
    written = json.loads((tmp_path / "out" / "kills.json").read_text())
    assert [trial["outcome"] for trial in written["trials"]] == ["identical", "identical", verdict.outcome, "identical"]
    assert written["origin"]["commit"]
    assert f"all,4,0,3,{1 - code},{code}" in (tmp_path / "out" / "kills.csv").read_text()
    # Only the run that failed is kept.
    kept = [path.name for path in tmp_path.glob("kills-*/*")]
    assert kept == (["trial-2"] if code else [])
    assert ("1 of 4 trials failed" in capsys.readouterr().err) == bool(code)
