import errno
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dfkd_fast import DfkdError
from dfkd_fast.engine.checkpoint_files import latest_checkpoint, load_checkpoint, load_latest, rename_damaged, save_checkpoint


def test_the_newest_two_checkpoints_are_kept_and_the_newest_is_returned(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for iteration in (9, 10, 100):
        save_checkpoint({"at": torch.tensor(iteration)}, tmp_path, iteration)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["iteration-00000010.pt", "iteration-00000100.pt"]
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    assert load_checkpoint(newest)["at"] == 100


def test_a_full_disk_leaves_the_older_checkpoint_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = save_checkpoint({"at": 1}, tmp_path, 1)

    def half_a_file(state: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", half_a_file)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint({"at": 2}, tmp_path, 2)
    assert list(tmp_path.iterdir()) == [old]
    monkeypatch.undo()
    assert load_checkpoint(old) == {"at": 1}


def test_checkpoints_are_identified_by_name_and_other_files_are_neither_read_nor_deleted(tmp_path: Path) -> None:
    others = ["iteration-old.pt", "iteration-00000500.pt.damaged", "notes.txt", "iteration-7 (copy).pt"]
    for name in others:
        (tmp_path / name).write_bytes(b"somebody's")
    (tmp_path / "iteration-99999999999.pt").mkdir()
    for iteration in (99_999_998, 99_999_999, 100_000_000):
        save_checkpoint({"at": iteration}, tmp_path, iteration)
    kept = ["iteration-100000000.pt", "iteration-99999999.pt", "iteration-99999999999.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others + kept)
    newest = load_latest(tmp_path)
    assert newest is not None
    assert newest.state == {"at": 100_000_000}


def test_a_checkpoint_can_be_read_by_pytorch_alone(tmp_path: Path) -> None:
    path = save_checkpoint({"at": torch.arange(1000)}, tmp_path, 1)
    assert torch.equal(torch.load(path, weights_only=True)["at"], torch.arange(1000))


def flipped(content: bytes, byte: int) -> bytes:
    return content[:byte] + bytes([content[byte] ^ 1]) + content[byte + 1 :]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "it is empty"),
    "garbage": (lambda content: b"not a checkpoint", "it is truncated or not a checkpoint"),
    "truncated": (lambda content: content[:500], "it is truncated or not a checkpoint"),
    "cut in the checksum": (lambda content: content[:-5], "it is truncated or not a checkpoint"),
    "zeros, as after a power failure": (lambda content: bytes(len(content)), "it is truncated or not a checkpoint"),
    "a bit of a tensor": (lambda content: flipped(content, 2000), "does not match its checksum"),
    "a bit of the checksum": (lambda content: flipped(content, -10), "does not match its checksum"),
    "something behind it": (lambda content: content + b"more", "it is truncated or not a checkpoint"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_read(tmp_path: Path, damage: str) -> None:
    break_it, problem = DAMAGES[damage]
    older = save_checkpoint({"at": torch.zeros(1000)}, tmp_path, 1)
    path = save_checkpoint({"at": torch.ones(1000)}, tmp_path, 2)
    path.write_bytes(break_it(path.read_bytes()))
    with pytest.raises(DfkdError, match=r"iteration-00000002\.pt cannot be read") as caught:
        load_checkpoint(path)
    assert problem in str(caught.value)
    assert "weights_only" not in str(caught.value)
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert (loaded.path, loaded.damaged) == (older, {path: str(caught.value)})
    assert torch.equal(loaded.state["at"], torch.zeros(1000))


def test_every_flipped_bit_is_detected(tmp_path: Path) -> None:
    path = save_checkpoint({"at": torch.ones(3)}, tmp_path, 1)
    content = path.read_bytes()
    for byte in range(0, len(content), 7):
        path.write_bytes(flipped(content, byte))
        with pytest.raises(DfkdError, match="cannot be read"):
            load_checkpoint(path)


def test_where_all_are_damaged_each_is_named(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "nowhere") is None
    for iteration in (1, 2):
        save_checkpoint({"at": iteration}, tmp_path, iteration).write_bytes(b"")
    with pytest.raises(DfkdError, match=r"iteration-00000002\.pt .*iteration-00000001\.pt .*it is empty"):
        load_latest(tmp_path)


def test_a_renamed_damaged_checkpoint_is_ignored(tmp_path: Path) -> None:
    paths = [save_checkpoint({"at": iteration}, tmp_path, iteration) for iteration in (1, 3)]
    aside = rename_damaged(paths[1])
    save_checkpoint({"at": 2}, tmp_path, 2)
    assert sorted(tmp_path.iterdir()) == [paths[0], tmp_path / "iteration-00000002.pt", aside]


def test_checkpoints_without_a_checksum_are_read_as_earlier_versions_wrote_them(tmp_path: Path) -> None:
    path = tmp_path / "iteration-00000001.pt"
    torch.save({"at": 1}, path)
    assert load_checkpoint(path) == {"at": 1}


def test_a_kill_at_any_moment_of_writing_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every change to the folder its contents, which a killed process would leave, include a complete checkpoint."""
    moments = []

    def watched(name: str, call: Callable[..., Any]) -> None:
        def change(*arguments: Any, **options: Any) -> Any:
            result = call(*arguments, **options)
            moments.append((name, load_latest(tmp_path)))
            return result

        monkeypatch.setattr(Path, name, change)

    for iteration in (1, 2):
        save_checkpoint({"at": iteration}, tmp_path, iteration)
    for name in ("write_bytes", "replace", "unlink"):
        watched(name, getattr(Path, name))
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((len(moments), stat.S_ISDIR(os.fstat(file).st_mode))))
    save_checkpoint({"at": 3}, tmp_path, 3)
    assert [(name, loaded and loaded.state["at"]) for name, loaded in moments] == [
        ("write_bytes", 2),
        ("replace", 3),
        ("unlink", 3),  # of the temporary file, which was renamed
        ("unlink", 3),
    ]
    assert synced == [(1, False), (2, True)]  # content before the rename, folder before a deletion


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("touched-by-a-pickle"),)


def test_a_pickle_that_would_run_code_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "iteration-00000001.pt"
    torch.save({"evil": Malicious()}, path, pickle_module=pickle)
    with pytest.raises(DfkdError, match="cannot be read") as caught:
        load_checkpoint(path)
    assert "weights_only" not in str(caught.value)
    assert "trust" not in str(caught.value)
    assert not (tmp_path / "touched-by-a-pickle").exists()
