"""Exclusive locks on folders."""

import errno
import json
import os
import socket
import sys
from pathlib import Path
from types import ModuleType

from .files import naming

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

__all__ = ["LOCK", "FolderInUseError", "FolderLock"]

LOCK = ".lock"
"""Name of the file in a folder that its :class:`FolderLock` locks."""
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Errors of flock on a file system without locks."""


class FolderInUseError(Exception):
    """Another process has locked the folder; the message names it, if it has written its record."""


class FolderLock:
    """An exclusive lock on a folder, held until :meth:`release` or until the process ends.

    It is a flock on a file in the folder, which the system releases with the process. Neither forked processes (a DataLoader's
    workers) nor started programs inherit it.

    Args:
        folder: an existing folder; the file ``.lock`` is created in it and kept.
        job: name of the launcher's job, which :meth:`job_of` returns.

    Raises:
        FolderInUseError: another process holds the lock.
        OSError: the file cannot be written.
    """

    def __init__(self, folder: Path, job: str = "") -> None:
        self.path = folder / LOCK
        self.effective = True
        """False if the file system does not support locks."""
        self.made = False
        """Whether this lock created the file."""
        while True:
            self._open()
            try:
                with naming(self.path):
                    self._lock()
                if self._is_current():
                    break
            except BaseException:
                os.close(self._file)
                raise
            os.close(self._file)  # its holder has removed it in the meantime
        _held.add(self._file)
        try:
            with naming(self.path):
                self._write({"pid": os.getpid(), "host": socket.gethostname(), "command": " ".join(sys.argv), "job": job})
        except OSError:
            self.release(remove=True)
            raise

    def release(self, *, remove: bool = False) -> None:
        """Release the lock; does nothing if it is released already.

        Args:
            remove: whether to delete the lock file.
        """
        if self._file not in _held:  # released already, or a forked process's copy
            return
        if remove:
            self.path.unlink(missing_ok=True)  # while it is locked: another process that has it open notices
        _held.discard(self._file)
        os.close(self._file)

    @staticmethod
    def job_of(folder: Path) -> str:
        """Returns the job of the folder's last holder, running or not; empty if unknown."""
        return str(_read(folder / LOCK).get("job", ""))

    def _open(self) -> None:
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            self.made = True
        except FileExistsError:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            self.made = False

    def _lock(self) -> None:
        if fcntl is None:
            self.effective = False
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderInUseError(_holder(_read(self.path))) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            self.effective = False

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file), self.path.stat())
        except FileNotFoundError:
            return False

    def _write(self, record: dict[str, object]) -> None:
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(record).encode() + b"\n", 0)


_held: set[int] = set()


def _close_in_child() -> None:
    """Close the lock files in a forked process: a flock lasts as long as any copy of its file is open."""
    for file in _held:
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _read(path: Path) -> dict[str, object]:
    """Returns the record of the lock's holder; empty if it is not written yet."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _holder(record: dict[str, object]) -> str:
    if not record.keys() >= {"pid", "host", "command"}:
        return "in use by another process"
    return f"in use by process {record['pid']} on {record['host']} ({record['command']})"
