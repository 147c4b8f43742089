"""Commands print in whatever encoding and width the environment gives them; what is data is UTF-8 wherever it goes."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dfkd_fast.console import shell_quoted
from tests.bad_input.finished_runs import METRICS, SUMMARY
from tests.command_line import Run


def command(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "dfkd_fast", *arguments], cwd=cwd, env=os.environ | environment, capture_output=True)


def finished(folder: Path, recipe: str) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "summary.json").write_text(json.dumps(SUMMARY | {"recipe": recipe}))
    (folder / "run" / "metrics.jsonl").write_text(METRICS)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_letters_that_the_terminal_lacks_are_replaced(tmp_path: Path, encoding: str) -> None:
    finished(tmp_path, "größer-日本")
    result = command("compare", "run", cwd=tmp_path, PYTHONIOENCODING=encoding)
    assert (result.returncode, result.stderr) == (0, b"")
    assert ("größer-日本, seed 0".encode(encoding, "replace")) in result.stdout
    assert (tmp_path / "compare.png").stat().st_size > 0


def test_help_is_printed_in_ascii(tmp_path: Path) -> None:
    for arguments in ((), ("distill",)):
        result = command(*arguments, "--help", cwd=tmp_path, PYTHONIOENCODING="ascii")
        assert (result.returncode, result.stderr) == (0, b"")
        assert b"Usage:" in result.stdout


def test_an_error_whose_letters_the_terminal_lacks_is_one_line(tmp_path: Path) -> None:
    result = command("show", "digits", "--set", "loop.epochs=0", cwd=tmp_path, PYTHONIOENCODING="latin-1")
    assert result.returncode == 2
    assert result.stderr == b"dfkd-fast: recipe 'digits': loop.epochs = 0: must be a whole number \\u2265 1 and \\u2264 2147483647\n"


def test_a_recipe_is_shown_as_toml_in_utf_8_whatever_the_terminal_has(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('extends = "digits"\ndescription = "größer, 日本"\n', "utf-8")
    result = command("show", "mine.toml", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr) == (0, b"")
    assert tomllib.loads(result.stdout.decode())["description"] == "größer, 日本"


def test_a_run_of_any_name_is_written_and_read_in_utf_8_whatever_the_locale_has(tmp_path: Path) -> None:
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"}
    code = (
        "from pathlib import Path; from dfkd_fast.report import RunFolder; "
        "folder = RunFolder(Path('run')); folder.write_recipe('name = \"gr\\u00f6\\u00dfer\"\\n'); folder.check_recipe()"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | locale, capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"")
    assert tomllib.loads((tmp_path / "run" / "recipe.toml").read_text("utf-8"))["name"] == "größer"


@pytest.mark.parametrize("columns", ["0", "1", "-5", "many", "", "9" * 30])
def test_a_width_that_no_terminal_has_loses_nothing(run: Run, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for arguments, line in ((("recipes",), "digits-dfad"), (("--help",), "Distill a frozen teacher")):
        result = run(*arguments)
        assert (result.code, result.err) == (0, "")
        assert line in result.out
        assert max(map(len, result.out.splitlines())) < 1000


def test_a_backend_of_windows_that_matplotlib_does_not_know_is_ignored(tmp_path: Path) -> None:
    finished(tmp_path, "digits")
    result = command("compare", "run", cwd=tmp_path, MPLBACKEND="nonsense")
    assert (result.returncode, result.stderr) == (0, b"")


@pytest.mark.parametrize("name", ["plain", "a b'c", "new\nline", "tab\t'quoted'\\", os.fsdecode(b"\xff\xfe"), "\u00e4\u200b"])
def test_a_path_is_quoted_as_a_shell_reads_it(name: str) -> None:
    result = subprocess.run(["bash", "-c", f"printf %s {shell_quoted(Path(name))}"], capture_output=True, check=True).stdout
    assert result == os.fsencode(name)
    assert shell_quoted(Path(name)).isprintable()


@pytest.mark.parametrize("command", [["recipes"], ["show", "digits"]])
def test_an_output_on_a_full_disk_is_reported_as_such(command: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run([sys.executable, "-m", "dfkd_fast", *command], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert result.stderr.startswith("dfkd-fast: the output: [Errno 28] No space left on device")
