"""The whole of python -m bench gpu at toy size on a CPU, as a user starts it."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.gpu import rehearsal, schedule
from bench.gpu.records import read
from bench.gpu.stages import STAGES
from bench.gpu.summary import latest

ROOT = Path(__file__).parents[2]


def test_every_stage_of_the_rehearsal_passes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "gpu", "--rehearse", "--minutes", "20", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr + (tmp_path / "failures.txt").read_text()
    records = latest(read(tmp_path / "results.jsonl"))
    assert [record.stage for record in records if not record.case] == [stage.name for stage in STAGES]
    counts = Counter((record.stage, record.status) for record in records if record.case)
    for stage in STAGES:
        assert counts[stage.name, "ok"] > 0
        assert counts[stage.name, "left"] == 0
    assert all(record.origin["rehearsal"] for record in records)
    assert {record.table for record in records} >= {"micro", "end-to-end", "accuracy", "kernels", "ceilings", "host"}
    files = list(tmp_path.iterdir())
    assert len(files) <= 6
    assert all(file.is_file() and file.stat().st_size < 10_000_000 for file in files)
    table = (tmp_path / "summary.txt").read_text().splitlines()
    assert len(table) <= 60
    assert run.stdout.splitlines()[-len(table) :] == table


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch finds a GPU")
def test_without_a_gpu_the_error_names_the_rehearsal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused([], monkeypatch, capsys) == "bench: PyTorch finds no GPU; --rehearse runs everything at toy size on a CPU"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "smok"], "--stage 'smok': must be one of environment, smoke, tests, micro, end-to-end, accuracy"),
        (["--rehearse", "--minutes", "0"], "--minutes 0: must be above 0"),
        (["--rehearse", "--minutes", "nan"], "--minutes nan: must be above 0"),
        (["--rehearse", "--out", ""], "--out '.': must not be the current folder"),
        (["--rehearse", "--commit", "`x`"], "--commit '`x`': must be letters, digits"),
        (["--rehearse", "--data-root", "nowhere"], "--data-root nowhere: is not a folder"),
        (["--rehearse", "--out", "README.md"], "--out README.md: is not a folder"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(arguments, monkeypatch, capsys)


def test_the_default_folder_may_hold_files_of_an_interrupted_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    left = tmp_path / "rehearsal" / "log.txt"
    left.parent.mkdir()
    left.write_text("== environment")
    monkeypatch.setattr(schedule, "STATE", tmp_path)
    monkeypatch.setattr(schedule.Campaign, "run", lambda self, minutes, chosen: [])
    monkeypatch.setattr(rehearsal, "environment", dict)
    monkeypatch.setattr(sys, "argv", ["bench", "gpu", "--rehearse"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert not left.exists()


def refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the command's only error line; its exit code must be 2."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["bench", "gpu", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line
