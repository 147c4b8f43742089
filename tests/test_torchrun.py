import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

TINY = [
    *("--set", "loop.epochs=4", "--set", "loop.iterations_per_epoch=6", "--set", "loop.batch_size=8", "--set", "teacher.epochs=1"),
    *("--set", "generator.width=2", "--set", "report.samples=9"),
]
ONE_FAILS = """
import os
from dfkd_fast import DfkdError, Trainer
from dfkd_fast.cli import main

iterate = Trainer.iterate

def fail(trainer):
    if os.environ["RANK"] == os.environ["FAILING"] and trainer.iterations_done == 3:
        raise DfkdError("data.root = 'here': is missing")
    iterate(trainer)

Trainer.iterate = fail
main()
"""


def torchrun(folder: Path, *program: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def said_by(processes: subprocess.Popen[str]) -> list[str]:
    """Our own lines: torchrun writes its report of failures around them."""
    _, err = processes.communicate(timeout=300)
    ours = [line for line in err.splitlines() if line.startswith("dfkd-fast: ")]
    assert "dfkd_fast/" not in err, err  # in a traceback
    return ours


def test_an_error_that_all_processes_raise_before_they_are_a_group_is_reported_once(tmp_path: Path) -> None:
    assert said_by(torchrun(tmp_path, "-m", "dfkd_fast", "distill", "nothing.toml")) == [
        "dfkd-fast: recipe 'nothing.toml' cannot be read: [Errno 2] No such file or directory: 'nothing.toml'"
    ]


def test_an_error_that_all_processes_raise_in_their_group_is_reported_once(tmp_path: Path) -> None:
    result = said_by(torchrun(tmp_path, "-m", "dfkd_fast", "distill", "digits", "--set", "objective.bn_moments=1.0"))
    assert len(result) == 1
    assert "bn_moments" in result[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("failing", "who"), [("0", ""), ("1", "process 1: ")])
def test_an_error_of_one_process_is_reported_alone_with_its_rank(tmp_path: Path, failing: str, who: str) -> None:
    (tmp_path / "one_fails.py").write_text(ONE_FAILS)
    result = said_by(torchrun(tmp_path, "one_fails.py", "distill", "digits", *TINY, FAILING=failing))
    assert result == [f"dfkd-fast: {who}data.root (--data-root) = 'here': is missing"]


def test_ctrl_c_saves_and_is_reported_once(tmp_path: Path) -> None:
    running = torchrun(tmp_path, "-m", "dfkd_fast", "distill", "digits", "--out", "a", *TINY, "--set", "loop.epochs=100000")
    checkpoints = tmp_path / "a" / "checkpoints"
    deadline = time.monotonic() + 200
    while not any(checkpoints.glob("iteration-*.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does; torchrun then signals its processes once more
    assert said_by(running) == ["dfkd-fast: interrupted and saved; resume with: dfkd-fast distill digits --out a --resume"]


def test_a_process_that_waits_for_others_is_interrupted(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        environment = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(nobody.getsockname()[1])}
        process = subprocess.Popen(
            [sys.executable, "-m", "dfkd_fast", "distill", "digits", "--device", "cpu"],
            cwd=tmp_path,
            env=os.environ | environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        with process, nobody.accept()[0]:
            process.send_signal(signal.SIGTERM)
            _, result = process.communicate()
    assert result.splitlines()[-1] == "dfkd-fast: process 1: interrupted; nothing was saved yet"
    assert process.returncode == 128 + signal.SIGTERM
