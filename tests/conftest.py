import copy
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dfkd_fast import Method, Trainer
from dfkd_fast.cli import main
from tests.alone import _in_turn as _in_turn
from tests.command_line import CommandResult, Run
from tests.small import Networks, small_networks


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="run every case of what usually runs as a sample, and under sanitizers")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    absent = {} if torch.cuda.is_available() else {"gpu": "PyTorch sees no GPU here"}
    if not config.getoption("exhaustive"):
        absent["exhaustive"] = "runs with --exhaustive only"
    for item in items:
        for marker, reason in absent.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
    items.sort(key=lambda item: item.get_closest_marker("alone") is None)  # first, before a test of minutes may be waited for


def pytest_collection_finish() -> None:
    # Thousands of test cases and imported modules, which every garbage collection would visit, also those before a capture.
    gc.collect()
    gc.freeze()


@pytest.fixture
def exhaustive(request: pytest.FixtureRequest) -> bool:
    """Whether all cases are asked for of what runs as a sample."""
    return bool(request.config.getoption("exhaustive"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Sums over threads are grouped by their number, and these tests compare bits."""
    torch.set_num_threads(1)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """The command line in this process and in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str | Path) -> CommandResult:
        monkeypatch.setattr(sys, "argv", ["dfkd-fast", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        result = capsys.readouterr()
        return CommandResult(code if isinstance(code, int) else int(code is not None), result.out, result.err)

    return call


@pytest.fixture
def make_trainer() -> Callable[..., Trainer]:
    """A trainer of small networks, always the same for the same arguments."""

    def make(method: Method, *, seed: int = 3, networks: Networks | None = None, **options: object) -> Trainer:
        teacher, student, generator = copy.deepcopy(networks or small_networks())
        return Trainer(teacher, student, generator, method, seed=seed, **options)  # type: ignore[arg-type]

    return make
