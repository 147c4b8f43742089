"""A cache that cannot be read or written leads to recompilation and one warning with the path."""

import errno
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")
import numba
from numba import prange
from numba.core import caching

from dfkd_fast.kernels import machine_code, simd
from dfkd_fast.kernels.machine_code import MachineCodeWarning


def double(x: np.ndarray, out: np.ndarray) -> None:
    for i in prange(len(x)):
        out[i] = 2 * x[i]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Compile ``double`` as a new process would, with a cache directory of the test."""

    def compile_again(folder: Path | str = tmp_path / "cache") -> Any:
        monkeypatch.setattr(machine_code, "_warned", set())
        monkeypatch.setattr(numba.config, "CACHE_DIR", str(folder))
        machine_code._folder.cache_clear()
        return simd.parallel(double)

    yield compile_again
    machine_code._folder.cache_clear()


def doubles(kernel: Any) -> bool:
    """Return whether a kernel gives correct results."""
    x, out = np.arange(100, dtype=np.float32), np.zeros(100, np.float32)
    kernel(x, out)
    return bool((out == 2 * x).all())


def loaded(kernel: Any) -> int:
    """Return the number of cache hits."""
    return sum(kernel.stats.cache_hits.values())


def test_machine_code_is_loaded_by_the_next_process_without_warnings(compiled: Callable[..., Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = compiled(), None
        assert doubles(first)
        second = compiled()
        assert doubles(second)
    assert (loaded(first), loaded(second)) == (0, 1)


@pytest.mark.parametrize("pattern", ["*.nbi", "*.nbc"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\x80garbage" + data[8:]])
def test_a_damaged_file_is_warned_about_and_rewritten(
    compiled: Callable[..., Any], tmp_path: Path, pattern: str, damage: Callable[[bytes], bytes]
) -> None:
    assert doubles(compiled())
    (path,) = (tmp_path / "cache").rglob(pattern)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(MachineCodeWarning, match=f"numba's cache {tmp_path}/cache/.* is damaged") as warned:
        kernel = compiled()
        assert doubles(kernel)
    assert (len(warned), loaded(kernel)) == (1, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel = compiled()
        assert doubles(kernel)
    assert loaded(kernel) == 1


def test_a_full_disk_is_warned_about_once(compiled: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(caching.IndexDataCacheFile, "_save_index", full)
    with pytest.warns(
        MachineCodeWarning, match=f"numba's cache {tmp_path}/cache/.* cannot be written \\(No space left on device\\)"
    ) as warned:
        assert doubles(compiled())
        assert doubles(simd.parallel(double))
    assert len(warned) == 1
    assert not list((tmp_path / "cache").rglob("*.nb?"))


def test_a_folder_that_cannot_be_created_is_warned_about(compiled: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(MachineCodeWarning, match=f"numba's cache {tmp_path}/file/.*: Not a directory: kernels are recompiled"):
        assert doubles(compiled(tmp_path / "file"))


def test_a_folder_that_cannot_be_written_is_warned_about(
    compiled: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.warns(MachineCodeWarning, match=f"numba's cache {tmp_path}/cache/.* cannot be written"):
        assert doubles(compiled())


def test_a_missing_home_directory_is_warned_about(compiled: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.warns(MachineCodeWarning, match="numba's cache: Could not determine home directory"):
        assert doubles(compiled(""))


RUN = """
import torch
from dfkd_fast.kernels import l1_discrepancy, use_backend
student = torch.arange(640.0).sin().view(64, 10).requires_grad_()
with use_backend("numba"):
    loss = l1_discrepancy(student, student.detach().flip(1), reduction="mean")
loss.backward()
print(loss.item().hex(), student.grad.norm().item().hex())
"""


def test_a_run_with_damaged_machine_code_gives_the_same_results_and_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-W", "always", "-c", RUN], capture_output=True, text=True, check=True)

    sound = run()
    assert sound.stderr == ""
    for path in tmp_path.rglob("*.nbc"):
        path.write_bytes(path.read_bytes()[:100])
    damaged = run()
    assert damaged.stdout == sound.stdout
    assert damaged.stderr.count("MachineCodeWarning") == 1
    assert str(tmp_path) in damaged.stderr
