"""numba's on-disk cache of machine code; if it cannot be read or written, kernels are recompiled with a warning."""

import functools
import hashlib
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba

__all__ = ["MachineCodeWarning", "njit_with_cache"]


class MachineCodeWarning(RuntimeWarning):
    """The on-disk cache cannot be used, so kernels are compiled in every process; shown once per process."""


def njit_with_cache(compile_kernel: Callable[..., Any], path: Path) -> Any:
    """Return numba's dispatcher ``compile_kernel(cache=True)``, with the cache disabled where it cannot be used.

    Args:
        compile_kernel: calls ``numba.njit``.
        path: source file that is compiled into every kernel; its hash is part of the cache key.
    """
    folder = _folder(path)
    if folder is None:
        return compile_kernel()
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)
    try:
        dispatcher = compile_kernel(cache=True)
    except RuntimeError as error:  # NUMBA_CACHE_LOCATOR_CLASSES
        _warn_once(f"numba's cache: {error}")
        return compile_kernel()
    finally:
        numba.config.CACHE_DIR = before
    dispatcher._cache = _Cache(dispatcher._cache)
    return dispatcher


@functools.cache
def _folder(path: Path) -> Path | None:
    """Create and return the cache directory; None if it cannot be written."""
    try:
        parent = Path(numba.config.CACHE_DIR or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dfkd_fast")
    except RuntimeError as error:  # no home directory
        _warn_once(f"numba's cache: {error}")
        return None
    folder = parent / hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _warn_once(f"numba's cache {folder}: {error.strerror}")
        return None
    if not os.access(folder, os.W_OK | os.X_OK):
        _warn_once(f"numba's cache {folder} cannot be written")
        return None
    return folder


class _Cache:
    """numba's cache of one kernel; on an error the kernel is recompiled."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def load_overload(self, signature: Any, context: Any) -> Any:
        """Return the machine code for a signature; None if there is none or it cannot be read."""
        try:
            return self._cache.load_overload(signature, context)
        except Exception as error:  # unpickling a damaged file can raise anything
            _warn_once(f"numba's cache {self._cache.cache_path} is damaged ({type(error).__name__}: {error})")
            with suppress(OSError):
                self._cache.flush()  # so that it is written again
            return None

    def save_overload(self, signature: Any, data: Any) -> None:
        """Save machine code; on an error the cache is disabled."""
        try:
            self._cache.save_overload(signature, data)
        except OSError as error:
            _warn_once(f"numba's cache {self._cache.cache_path} cannot be written ({error.strerror})")
            self._cache.disable()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


_warned: set[str] = set()


def _warn_once(problem: str) -> None:
    if not _warned:
        warnings.warn(f"{problem}: kernels are recompiled, which takes seconds", MachineCodeWarning, stacklevel=2)
    _warned.add(problem)
