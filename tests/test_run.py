"""The folder of a run: one process at a time, and a kill at any moment leaves what goes on or begins anew."""

import errno
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from dfkd_fast import Epoch, distributed
from dfkd_fast.claim import claim_free
from dfkd_fast.engine.checkpoint_files import save_checkpoint
from dfkd_fast.files import replacing
from dfkd_fast.locks import LOCK, FolderInUseError, FolderLock
from dfkd_fast.report import RunFolder, read_run
from dfkd_fast.run import Run as OpenRun
from dfkd_fast.run import open_run
from tests.command_line import Run
from tests.engine.test_distributed import together
from tests.report.test_compare import finished_run

TINY = [
    *("--set", "loop.epochs=3", "--set", "loop.iterations_per_epoch=2", "--set", "loop.batch_size=8", "--set", "loop.student_steps=2"),
    *("--set", "teacher.epochs=1", "--set", "generator.width=2", "--set", "report.samples=9"),
]
DEAD = 2**22 + 1
"""The number of no process: Linux has none above 2²²."""


def opened(out: Path | None = None, *, resume: bool = False, seed: int = 0, console: Console | None = None) -> OpenRun:
    overrides = {"seed": seed}
    return open_run("distill", "digits", overrides, out, resume, torch.device("cpu"), console or Console(quiet=True))


def epochs_of(folder: Path) -> list[int]:
    return [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def under_way(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A run under way in another process, with a checkpoint, and its folder."""
    command = [sys.executable, "-m", "dfkd_fast", "distill", "digits", "--out", folder.name, *TINY, "--set", "loop.epochs=100000", *options]
    with subprocess.Popen(command, cwd=folder.parent, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        while not list((folder / "checkpoints").glob("iteration-*.pt")):
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.05)
        yield process, folder
        process.kill()


@pytest.fixture
def endless(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    with under_way(tmp_path / "run") as found:
        yield found


def test_a_folder_belongs_to_one_process_until_it_ends(run: Run, endless: tuple[subprocess.Popen[str], Path]) -> None:
    process, folder = endless
    before = (folder / "recipe.toml").read_bytes()
    for command in ("distill", "teach"):
        result = run(command, "digits", "--out", "run", "--resume")
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert f"--out run is in use by process {process.pid} on " in result.err
        assert "distill digits --out run" in result.err
    assert run("distill", "digits", "--out", "run", *TINY).code == 2
    assert process.poll() is None
    assert (folder / "recipe.toml").read_bytes() == before
    assert run("evaluate", "run").code == 0  # which only reads

    process.kill()
    process.wait()
    with opened(folder, resume=True) as again:
        assert again.recipe.loop.epochs == 100000


def test_starts_at_the_same_time_have_a_folder_each(tmp_path: Path) -> None:
    def start(seed: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "dfkd_fast", "distill", "digits", "--seed", str(seed), *TINY]
        return subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

    processes = [start(seed) for seed in range(3)]
    for process in processes:
        _, err = process.communicate()
        assert process.returncode == 0, err
    folders = sorted((tmp_path / "runs").iterdir())
    assert [folder.name for folder in folders] == ["digits", "digits-2", "digits-3"]
    seeds = []
    for folder in folders:
        assert epochs_of(folder) == [1, 2, 3]
        seeds.append(json.loads((folder / "summary.json").read_text())["seed"])
        assert f"seed = {seeds[-1]}\n" in (folder / "recipe.toml").read_text()
    assert sorted(seeds) == [0, 1, 2]


def test_many_claims_of_a_default_name_never_share_a_folder(tmp_path: Path) -> None:
    together_now = threading.Barrier(12)
    default = tmp_path / "runs" / "digits"
    default.mkdir(parents=True)
    (default / "recipe.toml").write_text("somebody's")

    def claim(_: int) -> RunFolder:
        together_now.wait()
        return claim_free(default, "")

    with ThreadPoolExecutor(12) as pool:
        folders = list(pool.map(claim, range(12)))
    assert len({folder.path for folder in folders}) == 12
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"digits", *(folder.path.name for folder in folders)}
    for folder in folders:
        folder.release()
    # One that another thread made than the one that locked it may be left, empty.
    assert [path.name for path in (tmp_path / "runs").iterdir() if not RunFolder(path).is_unused] == ["digits"]


def test_two_starts_into_one_folder_are_one_run_and_one_refusal(in_tmp_path: Path) -> None:
    message = rf"--out mine is in use by process {os.getpid()} on .*: choose another folder"
    with opened(Path("mine")), pytest.raises(ValueError, match=message):
        opened(Path("mine"))
    assert not Path("mine").exists()


def test_a_lock_is_not_inherited_by_forked_processes_or_started_programs(tmp_path: Path) -> None:
    """Such as the workers of a DataLoader, which outlive a killed run for a while."""
    lock = FolderLock(tmp_path)
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False) as program:
        try:
            with pytest.raises(FolderInUseError):
                FolderLock(tmp_path)
            time.sleep(0.2)  # the forked one closes its copy at once, but not before it runs
            lock.release()
            FolderLock(tmp_path).release()
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            program.kill()


def test_a_lock_whose_file_was_removed_by_its_holder_is_acquired_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = FolderLock(tmp_path)
    flock = fcntl.flock

    def late(file: int, operation: int) -> None:
        first.release(remove=True)  # between the other's opening the file and locking it
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    second = FolderLock(tmp_path)
    assert os.path.samestat(os.fstat(second._file), (tmp_path / LOCK).stat())
    second.release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_without_locks_a_run_proceeds_with_a_note(run: Run, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def none(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    result = run("teach", "digits", "--out", "t", *TINY)
    assert result.code == 0, result.err
    assert result.out.count("the file system of t does not support locks: another process could write to the same folder\n") == 1
    folders = [claim_free(Path("runs/digits"), "").path.name for _ in range(2)]  # mkdir still tells which is whose
    assert folders == ["digits", "digits-2"]


def leave_no_recipe(folder: Path) -> None:
    """What a process leaves that is killed while it writes the recipe."""
    folder.mkdir()
    (folder / LOCK).write_text('{"pid"')
    (folder / "checkpoints" / "teacher").mkdir(parents=True)
    (folder / f".recipe.{DEAD}-0123abcd.part.toml").write_text("seed =")


def leave_a_cut_recipe(folder: Path) -> None:
    leave_no_recipe(folder)
    whole = RunFolder(folder.with_name("whole"))
    whole.write_recipe("seed = 0\nname = 'digits'\n")
    text = whole.recipe.read_text()
    (folder / "recipe.toml").write_text(text[: len(text) // 2])


def leave_an_empty_recipe(folder: Path) -> None:
    leave_no_recipe(folder)
    (folder / "recipe.toml").write_bytes(b"")


LEAVINGS = [Path.mkdir, leave_no_recipe, leave_a_cut_recipe, leave_an_empty_recipe]


@pytest.mark.parametrize("leave", LEAVINGS)
def test_a_folder_of_nothing_but_our_own_leftovers_counts_as_empty(in_tmp_path: Path, leave: Callable[[Path], None]) -> None:
    leave(Path("mine"))
    with opened(Path("mine")) as one:
        assert not list(Path("mine").rglob("*.part.*"))
        one.begin()
    with pytest.raises(ValueError, match="already exists"):
        opened(Path("mine"))
    with opened(Path("mine"), resume=True):
        pass


@pytest.mark.parametrize("leave", LEAVINGS)
def test_a_default_name_with_leftovers_is_used_and_resume_looks_past_it(in_tmp_path: Path, leave: Callable[[Path], None]) -> None:
    with opened(seed=5) as first:
        first.begin()
    leave(Path("runs/digits-2"))
    if not Path("runs/digits-2/recipe.toml").exists():
        with opened(resume=True, seed=5) as again:
            assert again.folder.path == Path("runs/digits")
    with opened() as second:
        assert second.folder.path == Path("runs/digits-2")


def test_only_temporary_files_of_killed_processes_are_deleted(in_tmp_path: Path) -> None:
    folder = RunFolder(Path("mine"))
    others = ["recipe.toml", f".notes.{os.getppid()}-0123abcd.part.json", ".mine.part.txt", "a.part", f".x.{DEAD}-0123.part.toml"]
    for name in [*others, f".summary.{DEAD}-0123abcd.part.json", f".x.{os.getpid()}-0123abcd.part"]:
        folder.write_text(folder.path / name, "")
    folder.write_text(folder.checkpoints / f".iteration-00000001.{DEAD}-89abcdef.part.pt", "")
    folder.write_text(folder.path / "elsewhere" / f".x.{DEAD}-0123abcd.part.toml", "")
    folder.claim()
    assert sorted(path.name for path in folder.path.iterdir()) == sorted([LOCK, "checkpoints", "elsewhere", *others])
    assert not list(folder.checkpoints.iterdir())
    assert list((folder.path / "elsewhere").iterdir())
    folder.release()


def test_two_writers_of_one_file_do_not_write_into_each_other_s(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with replacing(path) as one:
        one.write_text("one, and it is the longer one")
        with replacing(path) as other:
            other.write_text("other")
        assert path.read_text() == "other"
    assert path.read_text() == "one, and it is the longer one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("leave", [leave_a_cut_recipe, leave_an_empty_recipe])
def test_a_run_whose_recipe_is_not_whole_is_neither_resumed_nor_overwritten(
    run: Run, tmp_path: Path, leave: Callable[[Path], None]
) -> None:
    """A recipe cut off at the end of a line is TOML that leaves the rest to the defaults."""
    folder = tmp_path / "mine"
    leave(folder)
    (folder / "checkpoints" / "iteration-00000001.pt").write_bytes(b"")
    for options in ([], ["--resume"]):
        result = run("distill", "digits", "--out", "mine", *options)
        assert (result.code, result.err.count("\n")) == (2, 1)
    assert f"--resume: mine/recipe.toml is {'empty' if leave is leave_an_empty_recipe else 'truncated'}" in result.err
    assert (folder / "checkpoints" / "iteration-00000001.pt").exists()


def test_a_failure_before_the_run_has_begun_leaves_everything_as_it_was(run: Run, tmp_path: Path) -> None:
    Path("empty").mkdir()
    for options in ([], ["--out", "empty"], ["--out", "deep/er"]):
        assert run("distill", "digits", *options, "--set", "student.model=nothing").code == 2
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["empty"]


def test_resume_finds_the_newest_default_folder_though_numbers_are_missing(in_tmp_path: Path) -> None:
    for number in (3, 10, 4):
        folder = RunFolder(Path(f"runs/digits-{number}"))
        folder.path.mkdir(parents=True)
        with opened() as one:
            folder.write_recipe("")
        folder.recipe.unlink()
        with opened(folder.path, seed=number) as one:
            one.begin()
    Path("runs/5").mkdir()
    Path("runs/digits-mad").mkdir()
    with opened(resume=True, seed=10) as again:
        assert again.folder.path == Path("runs/digits-10")


@pytest.fixture
def torchrun_job(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Be the first process of a job that torchrun has started, or started again."""

    def be(name: str, restarts: int) -> None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))

    return be


@pytest.mark.parametrize("out", [None, Path("mine")])
@pytest.mark.parametrize("name", ["job1", "none"])
def test_a_restarted_job_resumes_in_its_own_folder(
    in_tmp_path: Path, torchrun_job: Callable[..., None], name: str, out: Path | None
) -> None:
    torchrun_job(name, 0)
    with opened(out, seed=1) as first:
        folder = first.folder.path
    torchrun_job(name, 1)
    with opened(out, seed=1) as again:  # it had not begun
        assert again.folder.path == folder
        again.begin()
    if out is None:
        torchrun_job("another", 0)
        with opened(seed=2) as other:
            other.begin()
    torchrun_job(name, 2)
    with opened(out, seed=1) as again:
        assert (again.folder.path, again.recipe.seed) == (folder, 1)


def test_a_job_refused_a_taken_folder_is_refused_it_after_its_restart_too(in_tmp_path: Path, torchrun_job: Callable[..., None]) -> None:
    with opened(Path("mine")) as somebodys:
        somebodys.begin()
    for restarts in (0, 1):
        torchrun_job("job1", restarts)
        with pytest.raises(ValueError, match="already exists"):
            opened(Path("mine"))


def check_agreement(folder: Path) -> None:
    os.chdir(folder)
    if distributed.rank() > 0:
        time.sleep(0.5)  # the first process has made the folder by then
    with opened() as one:
        assert distributed.all_gather([str(one.folder.path)]) == ["runs/digits-2"] * 2
        one.begin()
        distributed.barrier()
        with pytest.raises(ValueError, match="in use by process"):
            opened(Path("runs/digits-2"), resume=True)
    distributed.barrier()
    checkpoints = one.folder.checkpoints
    if distributed.rank() == 0:
        for iteration in (1, 2):
            state = {"training": {"at": iteration}, "seconds": 1.0}
            save_checkpoint(state, checkpoints, iteration)
        (checkpoints / "iteration-00000002.pt").write_bytes(b"")
    distributed.barrier()
    loaded: list[Any] = []

    class Told:
        load_state_dict = staticmethod(loaded.append)

    one.resume(Told(), checkpoints)  # type: ignore[arg-type]
    assert loaded == [{"at": 1}]


def test_all_processes_of_a_job_have_one_folder_and_one_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    (tmp_path / "runs" / "digits" / "somebody's").touch()
    together(2, check_agreement, tmp_path)


@pytest.fixture
def interrupted(run: Run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run stopped after two epochs, with a checkpoint of each."""
    log = RunFolder.log

    def stop(folder: RunFolder, epoch: Any) -> None:
        log(folder, epoch)
        if epoch.number == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", stop)
        assert run("distill", "digits", "--out", "b", *TINY).code == 130
    return Path("b")


def test_a_damaged_newest_checkpoint_costs_an_epoch(run: Run, interrupted: Path) -> None:
    checkpoints = interrupted / "checkpoints"
    newest = checkpoints / "iteration-00000004.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 4
    newest.write_bytes(content)
    result = run("distill", "digits", "--out", "b", "--resume")
    assert result.code == 0, result.err
    line = (
        f"checkpoint {newest} cannot be read: its content does not match its checksum; resuming from {checkpoints}/iteration-00000002.pt\n"
    )
    assert line in result.out
    assert epochs_of(interrupted) == [1, 2, 3]
    assert run("distill", "digits", "--out", "whole", *TINY).code == 0
    assert (interrupted / "student.safetensors").read_bytes() == Path("whole/student.safetensors").read_bytes()
    names = ["iteration-00000004.pt", "iteration-00000004.pt.damaged", "iteration-00000006.pt"]
    assert sorted(path.name for path in checkpoints.glob("iteration-*")) == names


def test_damaged_checkpoints_alone_are_one_line_and_stay(run: Run, interrupted: Path) -> None:
    paths = sorted((interrupted / "checkpoints").glob("iteration-*.pt"))
    for path in paths:
        path.write_bytes(b"")
    result = run("distill", "digits", "--out", "b", "--resume")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert all(str(path) in result.err for path in paths)
    assert sorted((interrupted / "checkpoints").glob("iteration-*")) == paths


def test_a_checkpoint_of_another_run_is_refused_and_stays(run: Run, interrupted: Path) -> None:
    assert run("distill", "digits", "--out", "c", "--seed", "7", *TINY).code == 0
    foreign = interrupted / "checkpoints" / "iteration-00000006.pt"
    foreign.write_bytes(Path("c/checkpoints/iteration-00000006.pt").read_bytes())
    result = run("distill", "digits", "--out", "b", "--resume")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert f"checkpoint {foreign} belongs to another run: seed is 7 there, and 0 in b/recipe.toml" in result.err
    assert foreign.is_file()
    torch.save({"training": [], "seconds": 1.0}, foreign)
    assert f"{foreign} is not a checkpoint of a run" in run("distill", "digits", "--out", "b", "--resume").err
    torch.save({"training": {}, "seconds": 1.0}, foreign)
    assert f"checkpoint {foreign}: the state does not match the networks" in run("distill", "digits", "--out", "b", "--resume").err
    foreign.unlink()
    assert run("distill", "digits", "--out", "b", "--resume").code == 0


def test_checkpoints_without_a_recipe_still_load(run: Run, interrupted: Path) -> None:
    for path in (interrupted / "checkpoints").glob("*.pt"):
        saved = torch.load(path, weights_only=True)
        del saved["recipe"]
        torch.save(saved, path)
    assert run("distill", "digits", "--out", "b", "--resume").code == 0
    assert epochs_of(interrupted) == [1, 2, 3]


def test_a_half_line_of_the_log_breaks_neither_the_resumed_run_nor_a_comparison(run: Run, interrupted: Path, tmp_path: Path) -> None:
    with (interrupted / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "los')
    assert run("distill", "digits", "--out", "b", "--resume").code == 0
    assert epochs_of(interrupted) == [1, 2, 3]

    other = finished_run(tmp_path / "other", "a", 0, [50.0, 90.0])
    for half in ('{"epoch": 3, "stu', "\0\0\0", ""):
        with (other / "metrics.jsonl").open("a") as file:
            file.write(half)
        assert read_run(other).curve == [(1, 50.0), (2, 90.0)]


def test_a_summary_exists_for_finished_runs_only(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("distill", "digits", "--out", "b", *TINY).code == 0
    newest = max(Path("b/checkpoints").glob("*.pt"))
    newest.write_bytes(b"")  # the run goes on from the one before it

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", killed)
        assert run("distill", "digits", "--out", "b", "--resume").code == 130
    assert "is not a finished run" in run("compare", "b").err
    assert run("distill", "digits", "--out", "b", "--resume").code == 0
    assert run("compare", "b").code == 0


def failing_mkdir(number: int) -> Callable[..., None]:
    def mkdir(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), str(path))

    return mkdir


def test_a_folder_that_cannot_be_used_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").write_text("somebody's")
    Path("dangling").symlink_to("nowhere/at/all")
    for out, message in [
        ("file", "--out file is a file, and must be a folder"),
        ("file/below/it", "--out file/below/it cannot be written: Not a directory"),
        ("/proc/run", "--out /proc/run cannot be written: No such file or directory"),
        ("dangling", "--out dangling cannot be written: File exists"),
        ("x" * 300, "cannot be written: File name too long"),
    ]:
        for command in ("distill", "teach"):
            result = run(command, "digits", "--out", out, *TINY)
            assert (result.code, result.err.count("\n")) == (2, 1)
            assert message in result.err
    assert "--resume: file holds no run" in run("distill", "digits", "--out", "file", "--resume").err
    assert Path("file").read_text() == "somebody's"

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", failing_mkdir(errno.EROFS))
        assert "--out runs/digits cannot be written: Read-only file system" in run("distill", "digits", *TINY).err

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        assert "cannot be written: No space left on device" in run("distill", "digits", "--out", "new", *TINY).err
    assert not Path("new").exists()


def test_scalars_of_epochs_that_are_repeated_count_once(tmp_path: Path) -> None:
    def epoch(number: int, loss: float) -> Epoch:
        return Epoch(number, 1.0, {"student": loss}, 50.0, drift={"generator": 0.1}, relative_bn_moments=0.3)

    for folder, done, numbers in (
        (RunFolder(tmp_path), 0, (1, 2, 3)),
        (RunFolder(tmp_path), 1, (2, 3, 4)),
        (RunFolder(tmp_path), 0, (1, 2)),
    ):
        folder.begin_log([epoch(number, number * 1.0) for number in range(1, done + 1)])
        for number in numbers:
            folder.log(epoch(number, number * 1.0 + len(numbers)))
        folder.end_log()
        with max((tmp_path / "tensorboard").iterdir()).open("ab") as file:
            file.write(b"half a record")
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert [scalar.step for scalar in events.Scalars("loss/student")] == epochs_of(tmp_path) == [*range(1, done + 1), *numbers]
        assert set(events.Tags()["scalars"]) == {"loss/student", "accuracy/student", "drift/generator", "bn_moments/relative"}


@pytest.mark.parametrize("full", ["metrics.jsonl", "tensorboard"])
def test_a_log_that_cannot_be_written_is_one_line(run: Run, interrupted: Path, monkeypatch: pytest.MonkeyPatch, full: str) -> None:
    """/dev/full takes no byte, as a full disk."""
    open_ = Path.open

    def on_a_full_disk(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        is_full = full in path.parts and mode in ("a", "xb")
        return open_(Path("/dev/full"), mode.replace("x", "a"), *rest, **options) if is_full else open_(path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", on_a_full_disk)
    result = run("distill", "digits", "--out", "b", "--resume")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "No space left on device" in result.err
    assert f"'b/{full}" in result.err
    monkeypatch.setattr(Path, "open", open_)
    assert run("distill", "digits", "--out", "b", "--resume").code == 0
    assert epochs_of(interrupted) == [1, 2, 3]


def test_another_teacher_during_a_run_is_refused(run: Run) -> None:
    assert run("distill", "digits", "--out", "run", *TINY).code == 0
    assert run("teach", "digits", "--out", "other", *TINY, "--seed", "1").code == 0
    for checkpoint in list(Path("run/checkpoints").glob("iteration-*.pt"))[1:]:
        checkpoint.unlink()
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file() and path.name != LOCK}
    result = run("distill", "digits", "--out", "run", "--resume", "--teacher", "other/teacher.safetensors")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "the state is of a run with another teacher: its SHA-256 is " in result.err
    assert all(path.read_bytes() == content for path, content in before.items())
    assert run("distill", "digits", "--out", "run", "--resume", "--teacher", "run/teacher.safetensors").code == 0


def test_a_teacher_whose_file_changed_during_a_run_is_refused(run: Run) -> None:
    assert run("distill", "digits", "--out", "run", *TINY).code == 0
    teacher = Path("run/teacher.safetensors")
    content = bytearray(teacher.read_bytes())
    content[-3] ^= 1  # of a weight's mantissa
    teacher.write_bytes(content)
    result = run("distill", "digits", "--out", "run", "--resume")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "run/teacher.safetensors are damaged: the content does not match the checksum in the header" in result.err


def test_a_teacher_of_another_recipe_before_the_student_s_first_checkpoint_is_refused(run: Run) -> None:
    assert run("teach", "digits", "--out", "run", *TINY).code == 0
    assert run("teach", "digits", "--out", "other", *TINY, "--set", "teacher.epochs=2").code == 0
    Path("run/teacher.safetensors").write_bytes(Path("other/teacher.safetensors").read_bytes())
    result = run("distill", "digits", "--out", "run", "--resume")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "run/teacher.safetensors belongs to another run: teacher.epochs is 2 there, and 1 in run/recipe.toml" in result.err


def test_a_checksum_without_a_file_is_refused(run: Run) -> None:
    result = run("distill", "digits", "--out", "run", *TINY, "--set", 'teacher.sha256="abc"')
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "teacher.sha256 = 'abc': requires a weight file: name it with --teacher FILE" in result.err
    assert not Path("run").exists()


def test_teach_names_the_file_that_was_given(run: Run) -> None:
    assert run("teach", "digits", "--out", "run", *TINY).code == 0
    result = run("teach", "digits", "--out", "again", *TINY, "--set", "teacher.weights=run/teacher.safetensors")
    assert result.code == 0 and "run/teacher.safetensors" in result.out and "again/teacher.safetensors" not in result.out


def test_messages_are_printed_verbatim_whatever_the_folder_is_called(run: Run) -> None:
    assert run("distill", "digits", "--out", "p[/q]", *TINY).code == 0
    newest = max(Path("p[/q]/checkpoints").glob("iteration-*.pt"))
    newest.write_bytes(newest.read_bytes()[:-100])
    result = run("distill", "digits", "--out", "p[/q]", "--resume")
    assert result.code == 0, result.err
    assert "p[/q]/checkpoints/" in result.out


def test_the_resume_command_finds_the_run(run: Run, tmp_path: Path) -> None:
    with under_way(tmp_path / "my run", "--set", "name=mine") as (process, _):
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    _, _, command = err.strip().partition("resume with: dfkd-fast ")
    result = run(*shlex.split(command), "--set", "loop.epochs=3")  # it would never end
    assert "loop.epochs is 100000 in my run/recipe.toml, and cannot become 3 in the middle of a run" in result.err


def test_seconds_of_earlier_processes_count_once(run: Run) -> None:
    assert run("distill", "digits", "--out", "run", *TINY).code == 0
    Path("run/teacher.safetensors").unlink()  # its checkpoints tell its seconds as well
    before = json.loads(Path("run/summary.json").read_text())["seconds"]["total"]
    start = time.perf_counter()
    assert run("distill", "digits", "--out", "run", "--resume").code == 0
    elapsed = time.perf_counter() - start
    after = json.loads(Path("run/summary.json").read_text())["seconds"]
    assert after["total"] <= before + elapsed
    assert after["total"] >= after["teacher"] + after["student"]
