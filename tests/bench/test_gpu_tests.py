"""The stage of python -m bench gpu that runs tests: each test is a case, failures have a reason, and a second call runs the rest."""

from pathlib import Path
from typing import Any

from _pytest.mark.expression import Expression

from bench.gpu import tests
from bench.gpu.records import Record
from bench.gpu.summary import latest
from tests.bench.faults import campaign, stage

TESTS = """
import os, time
import pytest

def test_passes(): pass

def test_fails():
    assert 1 == 2, "planted"

@pytest.mark.skip(reason="not available")
def test_is_skipped(): pass

@pytest.fixture
def broken(): raise RuntimeError("planted fixture")

def test_has_a_broken_fixture(broken): pass

def test_crashes():
    os._exit(7)

def test_comes_after_the_crash(): pass
"""


def run(folder: Path, text: str, tested: Path | None = None, *, limit: float = 60.0, parts: bool = False) -> dict[str, Record]:
    """Return the records of the tests in a file or folder by function name; with ``parts`` also those of whole pytest runs."""
    file = folder / "test_planted.py"
    file.write_text(text)
    variables = {"PLANTED_TESTS": str(tested or file)}
    ran = campaign(folder, stage("tests", "few_tests", limit=limit), variables=variables, log=lambda line: None)
    ran.run(5.0)
    return {record.case.rpartition("::")[2]: record for record in latest(ran.records) if parts or record.table != "pytest"}


def test_every_test_is_a_case_and_a_failure_has_its_reason(tmp_path: Path) -> None:
    records = run(tmp_path, TESTS)
    assert {name: record.status for name, record in records.items()} == {
        "test_passes": "ok",
        "test_fails": "failed",
        "test_is_skipped": "skipped",
        "test_has_a_broken_fixture": "failed",
        "test_crashes": "failed",
        "test_comes_after_the_crash": "ok",
        "": "ok",
    }
    assert records["test_fails"].text == "AssertionError: planted"
    assert "assert 1 == 2" in records["test_fails"].detail
    assert records["test_has_a_broken_fixture"].text == "RuntimeError: planted fixture"
    assert records["test_is_skipped"].text == "not available"
    assert "crashed" in records["test_crashes"].text


LOSING = """
import torch

def lose():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_loses_the_gpu():
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, lose
    lose()

def test_is_innocent():
    assert not torch.cuda.is_initialized()
"""


def test_a_test_that_loses_the_gpu_fails_alone(tmp_path: Path) -> None:
    records = run(tmp_path, LOSING)
    assert records["test_loses_the_gpu"].status == "failed"
    assert records["test_is_innocent"].status == "ok"


def test_a_file_that_cannot_be_imported_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "test_sound.py").write_text("def test_sound(): pass\n")
    records = run(tmp_path, "import nothing_of_this_name\n", tmp_path)
    assert any(record.status == "failed" and "nothing_of_this_name" in record.text for record in records.values())
    assert records["test_sound"].status == "ok"


def test_a_part_without_tests_is_a_failure(tmp_path: Path) -> None:
    assert any(record.status == "failed" and "exit code 5" in record.text for record in run(tmp_path, "", parts=True).values())


def test_tests_without_time_are_left_and_a_second_call_runs_them(tmp_path: Path) -> None:
    slow = "import time\n\ndef test_first(): pass\n\ndef test_slow(): time.sleep({seconds})\n\ndef test_last(): pass\n"
    first = run(tmp_path, slow.format(seconds=300), limit=12.0)
    assert first["test_first"].status == "ok"
    assert first["test_slow"].status == first["test_last"].status == "left"
    second = run(tmp_path, slow.format(seconds=0))
    assert {second[name].status for name in ("test_first", "test_slow", "test_last", "")} == {"ok"}
    assert second["test_first"] == first["test_first"]


def test_every_test_that_needs_a_gpu_is_in_exactly_one_part() -> None:
    expressions = [Expression.compile(part.arguments[1]) for part in tests.ON_GPU]
    for markers in [set(), {"gpu"}, {"alone"}, {"last"}, {"gpu", "alone"}, {"gpu", "last"}]:
        has: Any = lambda name, markers=markers: name in markers  # noqa: E731
        assert sum(expression.evaluate(has) for expression in expressions) == ("gpu" in markers)
