"""Threads of runs that share a machine: the wait policy that commands set, and that of the user, which they leave alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dfkd_fast import cli, environment
from dfkd_fast.environment import running_threads, set_wait_policy
from tests.command_line import Run

CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
AT_IMPORT = """
import json, os, sys

class Report:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(json.dumps([os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")]), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Report())
from dfkd_fast import environment
environment.running_threads = lambda: {running}
os.cpu_count = lambda: 2
sys.argv = ["dfkd-fast", *{arguments}]
from dfkd_fast.cli import main
main()
"""


def policies(running: int, arguments: list[str], **chosen: str) -> list[str | None]:
    """OMP_WAIT_POLICY and GOMP_SPINCOUNT when a command imports PyTorch on two cores, beside this number of other running threads."""
    variables = {name: value for name, value in os.environ.items() if name not in CHOICES} | chosen
    code = AT_IMPORT.format(running=running, arguments=arguments)
    result = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    found: list[str | None] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize(
    ("running", "arguments", "chosen", "expected"),
    [
        *(
            pytest.param(2, arguments, {}, ["passive", None], id=f"{arguments[0]} beside another run")
            for arguments in (["distill", "digits"], ["teach", "digits"], ["evaluate", "student.safetensors"])
        ),
        pytest.param(0, ["distill", "digits"], {}, [None, None], id="alone"),
        pytest.param(2, ["distill", "digits"], {"OMP_WAIT_POLICY": "active"}, ["active", None], id="the user's policy"),
        pytest.param(2, ["distill", "digits"], {"GOMP_SPINCOUNT": "7"}, [None, "7"], id="the user's spin count"),
        pytest.param(2, ["distill", "digits"], {"OMP_NUM_THREADS": "1"}, [None, None], id="one thread"),
        pytest.param(2, ["show", "digits"], {}, [None, None], id="a command that computes nothing"),
    ],
)
def test_threads_sleep_beside_another_run_unless_the_user_has_chosen(
    running: int, arguments: list[str], chosen: dict[str, str], expected: list[str | None]
) -> None:
    assert policies(running, arguments, **chosen) == expected


@pytest.mark.parametrize(("passive", "level", "shown"), [(True, "info", True), (True, "warning", False), (False, "info", False)])
def test_a_command_says_that_its_threads_sleep(passive: bool, level: str, shown: bool, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "set_wait_policy", lambda: passive)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    result = run("evaluate", "missing.safetensors", "--recipe", "digits", "--device", "cpu", "--log-level", level)
    assert result.code == 2
    assert ("OMP_WAIT_POLICY=passive was set" in result.out and "OMP_NUM_THREADS=3" in result.out) == shown


@pytest.fixture
def before_pytorch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This process as one that has not imported PyTorch and whose user has chosen nothing."""
    monkeypatch.delitem(sys.modules, "torch")
    for name in CHOICES:
        monkeypatch.setenv(name, "")  # restored after the test, also where it was not set
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("cores", "threads", "running", "expected"),
    [
        (2, "", 1, True),
        (2, "2", 1, True),
        (2, "2,1", 1, True),
        (8, "", 1, False),  # less than a quarter of the cores
        (8, "", 2, True),
        (8, "4", 4, False),  # both fit
        (8, "4", 5, True),
        (1, "", 1, False),  # one core, one thread
    ],
)
def test_threads_sleep_if_those_of_others_leave_too_few_cores(
    cores: int, threads: str, running: int, expected: bool, before_pytorch: pytest.MonkeyPatch
) -> None:
    before_pytorch.setattr(environment, "running_threads", lambda: running)
    before_pytorch.setattr(os, "cpu_count", lambda: cores)
    if threads:
        before_pytorch.setenv("OMP_NUM_THREADS", threads)
    assert set_wait_policy() is expected
    assert os.environ.get("OMP_WAIT_POLICY") == ("passive" if expected else None)


def test_after_pytorch_is_imported_the_environment_stays(before_pytorch: pytest.MonkeyPatch) -> None:
    before_pytorch.setattr(environment, "running_threads", lambda: 100)
    before_pytorch.setitem(sys.modules, "torch", pytest)
    assert not set_wait_policy()
    assert "OMP_WAIT_POLICY" not in os.environ


@pytest.mark.parametrize(
    ("text", "expected"), [("2.03 1.20 0.90 3/120 4711\n", 2), ("0.00 0.00 0.00 1/100 5\n", 0), ("", 0), ("0.1 0.1 0.1 x/y 5\n", 0)]
)
def test_running_threads_are_read_from_the_kernel(text: str, expected: int, tmp_path: Path) -> None:
    (tmp_path / "loadavg").write_text(text)
    assert running_threads(tmp_path / "loadavg") == expected


def test_a_system_without_that_file_counts_none(tmp_path: Path) -> None:
    assert running_threads(tmp_path / "missing") == 0
