"""Writing files and folders so that a crash, a full disk, a Ctrl-C or a second process never leaves half of one or a mixture of two."""

import errno
import fcntl
import json
import os
import re
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["LOCK", "FolderInUseError", "FolderLock", "is_temporary", "make_folders", "naming", "remove_temporaries", "replacing"]

LOCK = ".lock"
"""Name of the file in a folder that its :class:`FolderLock` locks."""
TEMPORARY = re.compile(r"\..+\.(?P<pid>\d+)-[0-9a-f]{8}\.part(\.[^.]*)?")
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What flock fails with where the file system has no locks."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file that appears whole or not at all: write to the path given here; it takes ``path``'s place at the end.

    The temporary file has a name of its own, so that no other process writes to it; :func:`remove_temporaries` knows it again.
    When this returns, both content and name have reached the disk: a power failure loses neither.

    Raises:
        OSError: it could not be written; what stood at ``path`` is untouched and nothing is left beside it.
    """
    # The suffix stays at the end: writers of pictures take the format from it.
    part = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.part{path.suffix}")
    try:
        with naming(path, part):
            yield part
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            part.replace(path)
            _sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def naming(path: Path, part: Path | None = None) -> Iterator[None]:
    """Let an OSError from inside name the file ``path``, where it names none or ``part``.

    A failed write knows no name, and that of a temporary file means nothing to a user, who wants to know which file it was.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename in (None, part and str(part)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def is_temporary(path: Path) -> bool:
    """Whether a file's name is one that :func:`replacing` gives while it writes."""
    return TEMPORARY.fullmatch(path.name) is not None


def remove_temporaries(folder: Path) -> None:
    """Delete the temporary files in a folder whose processes were killed; nothing else, and no error where that fails."""
    with suppress(OSError):
        for path in list(folder.iterdir()):
            found = TEMPORARY.fullmatch(path.name)
            if found and not _other_process_lives(int(found["pid"])):
                with suppress(OSError):
                    path.unlink()


def make_folders(path: Path) -> list[Path]:
    """Make a folder and its parents; returns those that this call made, outermost first: a folder two processes make is one's."""
    missing = [path]
    while not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    made = []
    for folder in reversed(missing):
        try:
            folder.mkdir()
            made.append(folder)
        except FileExistsError:
            if not folder.is_dir():
                raise
    return made


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
        while True:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
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

    def _lock(self) -> None:
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


def _other_process_lives(pid: int) -> bool:
    if pid == os.getpid():  # in a container a process may have the number of the one before it
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _sync_folder(folder: Path) -> None:
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # a folder may be written and not listed
        return
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every file system can
            raise
    finally:
        os.close(opened)
