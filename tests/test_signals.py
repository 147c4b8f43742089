import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dfkd_fast import Trainer
from dfkd_fast.engine.capture import Steps
from dfkd_fast.engine.teach import TeacherTrainer
from dfkd_fast.evaluation import Evaluator
from dfkd_fast.interrupt import TOGETHER, Interrupted, interrupting_on_signals, stopping_on_signals
from tests.command_line import Run

TINY = [
    *("--set", "loop.epochs=3", "--set", "loop.iterations_per_epoch=2", "--set", "loop.batch_size=8", "--set", "loop.student_steps=2"),
    *("--set", "teacher.epochs=1", "--set", "generator.width=2", "--set", "report.samples=9"),
]


class Running:
    def __init__(self) -> None:
        self.asked = 0

    def stop(self) -> None:
        self.asked += 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_asks_to_stop_and_a_later_one_interrupts_at_once(number: signal.Signals) -> None:
    running, now = Running(), [5.0]
    with (
        pytest.raises(Interrupted, match="interrupted again, without saving") as interrupted,
        stopping_on_signals(running, lambda: now[0]) as caught,
    ):
        signal.raise_signal(number)
        assert caught == [number]
        now[0] += TOGETHER + 0.1
        signal.raise_signal(number)
    assert running.asked == 1
    assert interrupted.value.exit_code == 128 + number


def test_signals_that_come_together_are_one() -> None:
    running = Running()
    with stopping_on_signals(running, lambda: 5.0) as caught:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGHUP):
            signal.raise_signal(number)
        assert caught == [signal.SIGINT]
    assert running.asked == 1


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupting_on_signals(), stopping_on_signals(Running()) as caught:
            signal.raise_signal(signal.SIGHUP)
            assert caught == []
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signal_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(Interrupted), interrupting_on_signals():
        signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_a_forked_process_is_not_interrupted_by_what_its_owner_handles() -> None:
    with interrupting_on_signals():
        for number, status in ((signal.SIGINT, 0), (signal.SIGTERM, -signal.SIGTERM)):
            child = os.fork()
            if child == 0:
                signal.raise_signal(number)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status


def interrupted_in(patch: pytest.MonkeyPatch, owner: type, name: str, number: signal.Signals) -> None:
    method = getattr(owner, name)

    def interrupted(*arguments: object, **options: object) -> object:
        signal.raise_signal(number)
        return method(*arguments, **options)

    patch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(("owner", "name"), [(Steps, "warm_up"), (TeacherTrainer, "__init__")])
def test_before_anything_is_saved_one_line_says_so_and_nothing_is_left(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, owner: type, name: str, number: signal.Signals
) -> None:
    interrupted_in(monkeypatch, owner, name, number)
    result = run("distill", "digits", *TINY)
    assert result.err == "dfkd-fast: interrupted; nothing was saved yet\n"
    assert result.code == 128 + number
    assert list(tmp_path.iterdir()) == []


def test_a_command_without_a_run_is_interrupted_in_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("teach", "digits", "--out", "a", *TINY).code == 0
    monkeypatch.setattr("dfkd_fast.commands.evaluate.evaluate", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    result = run("evaluate", "a/teacher.safetensors")
    assert result.err == "dfkd-fast: interrupted; nothing was saved yet\n"
    assert result.code == 130


def test_between_trainings_what_is_saved_and_how_to_resume_is_reported(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupted_in(patch, Evaluator, "__call__", signal.SIGINT)
        result = run("distill", "digits", "--out", "a", *TINY)
    assert result.code == 130
    assert result.err == (
        "dfkd-fast: interrupted; the last good checkpoint is a/checkpoints/teacher/iteration-00000001.pt;"
        " resume with: dfkd-fast distill digits --out a --resume\n"
    )
    assert run("distill", "digits", "--out", "a", "--resume").code == 0


def test_interrupted_again_the_last_checkpoint_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfkd_fast.interrupt.TOGETHER", -1.0)
    iterate = Trainer.iterate

    def interrupted(trainer: Trainer) -> None:
        iterate(trainer)
        if trainer.iterations_done == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "iterate", interrupted)
    result = run("distill", "digits", "--out", "a", *TINY)
    assert result.code == 143
    assert result.err == (
        "dfkd-fast: interrupted again, without saving; the last good checkpoint is a/checkpoints/iteration-00000002.pt;"
        " resume with: dfkd-fast distill digits --out a --resume\n"
    )


def wait_for(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_closed_terminal_ends_a_run_with_a_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dfkd_fast", "distill", "digits", "--out", "a", *TINY, "--set", "loop.epochs=100000"]
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(tmp_path)
        os.execve(sys.executable, command, os.environ | {"TERM": "xterm"})
    checkpoints = tmp_path / "a" / "checkpoints"
    wait_for(lambda: bool(os.read(terminal, 1 << 16)) and any(checkpoints.glob("iteration-*.pt")))
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert (tmp_path / "a" / "recipe.toml").is_file()
    assert not list(tmp_path.rglob("*.part*"))


def test_under_nohup_a_run_survives_the_hangup(tmp_path: Path) -> None:
    command = ["nohup", sys.executable, "-m", "dfkd_fast", "distill", "digits", "--out", "a", *TINY, "--set", "loop.epochs=100000"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        checkpoints = tmp_path / "a" / "checkpoints"
        wait_for(lambda: any(checkpoints.glob("iteration-*.pt")))
        process.send_signal(signal.SIGHUP)
        newest = max(checkpoints.glob("iteration-*.pt"))
        wait_for(lambda: max(checkpoints.glob("iteration-*.pt")) > newest)
        process.terminate()
        _, err = process.communicate()
    assert process.returncode == 143
    assert err.strip().splitlines()[-1].startswith("dfkd-fast: interrupted and saved; resume with: ")


def test_a_closed_pipe_ends_a_run_that_says_how_to_resume(tmp_path: Path, run: Run) -> None:
    command = [sys.executable, "-m", "dfkd_fast", "distill", "digits", *TINY, "--set", "loop.epochs=50"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "teacher 1/1" in line:  # the first that is written after the run has begun
                break
        process.stdout.close()
        result = process.stderr.read() if process.stderr else ""
    assert result.startswith("dfkd-fast: the output was closed by its reader; ")
    assert result.endswith("; resume with: dfkd-fast distill digits --out runs/digits --resume\n")
    assert result.count("\n") == 1
    assert process.returncode == 128 + signal.SIGPIPE
    assert run("distill", "digits", "--resume", "--quiet").code == 0


def test_an_exit_of_a_networks_own_code_is_an_error_that_says_how_to_resume(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    iterate = Trainer.iterate

    def exits(trainer: Trainer) -> None:
        if trainer.iterations_done == 3:
            sys.exit(0)
        iterate(trainer)

    monkeypatch.setattr(Trainer, "iterate", exits)
    result = run("distill", "digits", "--out", "a", *TINY)
    assert result.err.startswith("dfkd-fast: sys.exit(0) was called by code of a network; the last good checkpoint is a/checkpoints/")
    assert result.err.endswith("; resume with: dfkd-fast distill digits --out a --resume\n")
    assert result.code == 2


def test_a_fault_during_a_run_is_shown_with_how_to_resume(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    iterate = Trainer.iterate

    def fails(trainer: Trainer) -> None:
        if trainer.iterations_done == 3:
            raise IndexError("of a user's own network")
        iterate(trainer)

    monkeypatch.setattr(Trainer, "iterate", fails)
    with pytest.raises(BaseException, match="user's own network") as error:
        run("distill", "digits", "--out", "a", *TINY)
    assert error.value.__notes__[0].startswith("dfkd-fast: the last good checkpoint is a/checkpoints/")
    assert error.value.__notes__[0].endswith("; resume with: dfkd-fast distill digits --out a --resume")
