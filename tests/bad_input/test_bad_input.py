"""Bad input is refused in one line that names what is wrong, with exit code 2, and leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bad_input import data, environment, finished_runs, memory, networks, options, outputs, recipes, weights
from tests.bad_input.case import Case
from tests.command_line import CommandResult, Run

AREAS = (data, environment, finished_runs, memory, networks, options, outputs, recipes, weights)
CASES: list[Case] = [case for area in AREAS for case in area.CASES]


def listing(folder: Path) -> dict[str, bytes]:
    """Every file and folder below, with the content of files; but for what Python keeps of modules that it has imported."""
    paths = [path for path in folder.rglob("*") if "__pycache__" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in paths}


def in_own_process(case: Case, folder: Path) -> CommandResult:
    result = subprocess.run(
        [sys.executable, "-m", "dfkd_fast", *case.command],
        cwd=folder,
        env=os.environ | case.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return CommandResult(result.returncode, result.stdout, result.stderr)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(case: Case, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in case.files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    before = listing(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # which a user's module makes longer
    for variable, value in case.environment.items():
        monkeypatch.setenv(variable, value)
    result = in_own_process(case, tmp_path) if case.own_process else run(*case.command)
    assert result.err.startswith("dfkd-fast: "), result.err
    assert result.err.count("\n") == 1, result.err
    assert case.error in result.err
    assert result.code == 2
    assert listing(tmp_path) == before


def test_every_case_has_a_name_of_its_own() -> None:
    names = [case.name for case in CASES]
    assert sorted(names) == sorted(set(names))
