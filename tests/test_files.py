"""Files that are written whole or not at all, and what is not replaced: symlinks, devices, pipes."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dfkd_fast.files import is_temporary, replacing


def write(path: Path, text: str = "new") -> None:
    with replacing(path) as part:
        part.write_text(text)


def test_a_file_is_replaced_and_keeps_what_it_had_where_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write(path, "old")

    def fail() -> None:
        with replacing(path) as part:
            part.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (path.read_text(), list(tmp_path.iterdir())) == ("old", [path])
    write(path)
    assert (path.read_text(), list(tmp_path.iterdir())) == ("new", [path])


@pytest.mark.parametrize("there", [True, False])
def test_a_symlink_stays_one_and_what_it_names_is_replaced(tmp_path: Path, there: bool) -> None:
    target, first, second = tmp_path / "elsewhere" / "target.json", tmp_path / "first.json", tmp_path / "second.json"
    target.parent.mkdir()
    if there:
        target.write_text("old")
    first.symlink_to("elsewhere/target.json")
    second.symlink_to(first)
    write(second)
    assert (target.read_text(), list(target.parent.iterdir())) == ("new", [target])
    assert first.is_symlink()
    assert second.is_symlink()


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", list[str]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write(pipe)
    reader.join()
    assert read == ["new"]
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_device_is_written_to() -> None:
    write(Path("/dev/null"))
    assert Path("/dev/null").is_char_device()
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write(Path("/dev/full"))


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_a_redirected_output_is_not_replaced(tmp_path: Path, name: str) -> None:
    code = f"from pathlib import Path; from tests.test_files import write; print('a'); write(Path({name!r}), 'b'); print('c')"
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True, cwd=Path(__file__).parents[1])
    assert (tmp_path / "out").read_text() == "a\nbc\n"


@pytest.mark.parametrize("name", ["a" * 250, "ä" * 120 + ".json", "." * 3 + "x", os.fsdecode(b"\xff.json")])
def test_a_name_may_be_as_long_as_the_file_system_takes(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with replacing(path) as part:
        assert is_temporary(part)
        part.write_text("new")
    assert list(tmp_path.iterdir()) == [path]
