import errno
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from dfkd_fast import DfkdError
from dfkd_fast.engine.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint


def test_the_newest_two_are_kept_and_the_newest_is_found(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", None], ids=["empty", "garbage", "truncated"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: bytes | None) -> None:
    path = save_checkpoint({"at": torch.zeros(1000)}, tmp_path, 1)
    path.write_bytes(path.read_bytes()[:500] if damage is None else damage)
    with pytest.raises(DfkdError, match=r"iteration-00000001\.pt cannot be read"):
        load_checkpoint(path)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("touched-by-a-pickle"),)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "iteration-00000001.pt"
    torch.save({"evil": Malicious()}, path, pickle_module=pickle)
    with pytest.raises(DfkdError, match="cannot be read"):
        load_checkpoint(path)
    assert not (tmp_path / "touched-by-a-pickle").exists()
