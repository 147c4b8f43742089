"""Where numba's machine code is kept on disk, and how it goes on where that cannot be read or written: compiled anew, with a warning."""

import functools
import hashlib
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba

__all__ = ["MachineCodeWarning", "keeping_machine_code"]


class MachineCodeWarning(RuntimeWarning):
    """Kernels are compiled in every process, for the machine code on disk cannot be used; shown once a process."""


def keeping_machine_code(compile_kernel: Callable[..., Any], path: Path) -> Any:
    """What ``compile_kernel(cache=True)`` returns, a dispatcher of numba's that keeps its machine code on disk where that works.

    Args:
        compile_kernel: calls ``numba.njit``.
        path: of the source that is compiled into every kernel: machine code of another version of it is left alone.
    """
    folder = _folder(path)
    if folder is None:
        return compile_kernel()
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)
    try:
        dispatcher = compile_kernel(cache=True)
    except RuntimeError as error:  # NUMBA_CACHE_LOCATOR_CLASSES
        _tell(f"numba's cache: {error}")
        return compile_kernel()
    finally:
        numba.config.CACHE_DIR = before
    dispatcher._cache = _Cache(dispatcher._cache)
    return dispatcher


@functools.cache
def _folder(path: Path) -> Path | None:
    """The folder for machine code, which exists then; None where nothing can be written."""
    try:
        parent = Path(numba.config.CACHE_DIR or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dfkd_fast")
    except RuntimeError as error:  # a user without a home
        _tell(f"numba's cache: {error}")
        return None
    folder = parent / hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _tell(f"numba's cache {folder}: {error.strerror}")
        return None
    if not os.access(folder, os.W_OK | os.X_OK):
        _tell(f"numba's cache {folder} cannot be written")
        return None
    return folder


class _Cache:
    """numba's cache of one kernel, whose failures cost the time to compile it and nothing else."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def load_overload(self, signature: Any, context: Any) -> Any:
        """The machine code for a signature; None where there is none that can be read."""
        try:
            return self._cache.load_overload(signature, context)
        except Exception as error:  # a damaged file raises whatever its bytes happen to mean
            _tell(f"numba's cache {self._cache.cache_path} is damaged ({type(error).__name__}: {error})")
            with suppress(OSError):
                self._cache.flush()  # to be written anew
            return None

    def save_overload(self, signature: Any, data: Any) -> None:
        """Keep machine code, where there is room."""
        try:
            self._cache.save_overload(signature, data)
        except OSError as error:
            _tell(f"numba's cache {self._cache.cache_path} cannot be written ({error.strerror})")
            self._cache.disable()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


_told: set[str] = set()


def _tell(problem: str) -> None:
    if not _told:
        warnings.warn(f"{problem}: kernels are compiled anew, which takes seconds", MachineCodeWarning, stacklevel=2)
    _told.add(problem)
