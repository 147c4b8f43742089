import io
import logging
from pathlib import Path

import pytest
from rich.console import Console

from dfkd_fast.log import LOGGER, log_to_console
from tests.command_line import Run

TINY = [
    *("--set", "loop.epochs=3", "--set", "loop.iterations_per_epoch=2", "--set", "loop.batch_size=8", "--set", "loop.student_steps=2"),
    *("--set", "teacher.epochs=1", "--set", "generator.width=2", "--set", "report.samples=9", "--set", "replay.kind=none"),
]


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_a_message_is_shown_as_it_is_from_its_level_on(level: str) -> None:
    out = io.StringIO()
    with log_to_console(Console(file=out), level):  # type: ignore[arg-type]
        for name in ("debug", "info", "warning", "error"):
            LOGGER.log(getattr(logging, name.upper()), "[b]%s[/b]", name)
    names = ["debug", "info", "warning", "error"]
    assert out.getvalue().splitlines() == [f"[b]{name}[/b]" for name in names[names.index(level) :]]


def test_outside_of_a_command_the_logger_is_the_user_s(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    before = list(LOGGER.handlers)
    with log_to_console(Console(quiet=True), "error"):
        pass
    assert LOGGER.handlers == before
    assert LOGGER.propagate
    with caplog.at_level(logging.INFO, "dfkd_fast"):
        LOGGER.info("heard")
    assert "heard" in caplog.text
    assert capsys.readouterr() == ("", "")


def test_quiet_prints_nothing_but_errors(run: Run) -> None:
    result = run("distill", "digits", "--out", "a", *TINY, "--quiet")
    assert result == (0, "", "")
    assert run("evaluate", "a/student.safetensors", "--quiet", "--json", "a.json") == (0, "", "")
    assert Path("a.json").is_file()
    result = run("teach", "digits", "--out", "a", "--quiet")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("dfkd-fast: --out a already exists")


@pytest.mark.parametrize(
    ("level", "trial", "progress", "note"),
    [("debug", True, True, True), ("info", False, True, True), ("warning", False, False, True), ("error", False, False, False)],
)
def test_the_level_sets_what_is_printed_beside_the_results(
    run: Run, monkeypatch: pytest.MonkeyPatch, level: str, trial: bool, progress: bool, note: bool
) -> None:
    monkeypatch.setattr("dfkd_fast.evaluation.Evaluator.__call__", lambda *_: 10.0)
    result = run("distill", "digits", "--out", "a", *TINY, "--log-level", level)
    assert result.code == 0
    before, table, after = result.out.partition("\ndigits" if level != "error" else "digits")
    assert table and "folder" in after
    assert ("trying every kind of step" in before) is trial
    assert ("s/iteration" in before) is progress
    assert ("which is chance" in before) is note


def test_an_unknown_level_is_refused(run: Run) -> None:
    result = run("distill", "digits", "--log-level", "loud")
    assert result.code == 2
    assert "--log-level" in result.err
