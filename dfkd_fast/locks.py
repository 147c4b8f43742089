"""A folder for one process alone."""

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
"""What flock fails with where the file system has no locks."""


class FolderInUseError(Exception):
    """Another process has locked the folder; the message says which one, as far as it has said so itself."""


class FolderLock:
    """A folder for one process alone, until :meth:`release` or the process's end, however it ends.

    It is a flock on a file in the folder, which the system gives up with the process that holds it. Neither processes forked
    from the holder (a DataLoader's workers) nor programs it starts inherit it: it ends with the holder even if they live on.

    Args:
        folder: an existing folder; ``.lock`` is made in it and stays there.
        job: what :meth:`job_of` shall return; of processes that a launcher starts anew, its name.

    Raises:
        FolderInUseError: another process holds the lock.
        OSError: the file cannot be written.
    """

    def __init__(self, folder: Path, job: str = "") -> None:
        self.path = folder / LOCK
        self.effective = True
        """False where the file system has no locks: nothing keeps another process away."""
        self.made = False
        """Whether the file was not there before."""
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
            os.close(self._file)  # its holder has removed it meanwhile
        _held.add(self._file)
        try:
            with naming(self.path):
                self._write({"pid": os.getpid(), "host": socket.gethostname(), "command": " ".join(sys.argv), "job": job})
        except OSError:
            self.release(remove=True)
            raise

    def release(self, *, remove: bool = False) -> None:
        """Let others have the folder; once only.

        Args:
            remove: the file, too.
        """
        if self._file not in _held:  # released already, or a forked process's copy
            return
        if remove:
            self.path.unlink(missing_ok=True)  # while it is locked: whoever has it open sees that it is no longer there
        _held.discard(self._file)
        os.close(self._file)

    @staticmethod
    def job_of(folder: Path) -> str:
        """The job of the folder's last holder, living or not; empty if it had none or is unknown."""
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
    """A flock lasts as long as any copy of its file is open, and a forked process has copies of all."""
    for file in _held:
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _read(path: Path) -> dict[str, object]:
    """What a holder wrote about itself; empty if it has not, or is just about to."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _holder(record: dict[str, object]) -> str:
    if not record.keys() >= {"pid", "host", "command"}:
        return "in use by another process"
    return f"in use by process {record['pid']} on {record['host']} ({record['command']})"
