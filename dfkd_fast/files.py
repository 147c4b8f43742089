"""Writes files and folders such that a crash, a full disk or Ctrl-C never leaves a partial one."""

import errno
import os
import re
import secrets
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .errors import DfkdError

__all__ = ["check_output", "expanded", "is_temporary", "make_folders", "naming", "remove_temporaries", "replacing"]

DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/(stdout|stderr|fd/\d+)")
"""Paths of open file descriptors. They are appended to: replacing a file to which the shell redirects would lose the rest of the output."""
LONGEST_STEM = 200
"""Bytes of a file's name that its temporary file's name keeps, of the 255 that file systems allow."""
TEMPORARY = re.compile(r"\..+\.(?P<pid>\d+)-[0-9a-f]{8}\.part(\.[^.]*)?")


def expanded(path: str | Path) -> Path:
    """Returns a path with a leading ``~`` replaced by the home folder; unchanged for an unknown user."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  # pathlib's raises


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Atomically replace a file: yields a temporary path to write to, which is moved to ``path`` on exit.

    The temporary name is unique to the process, and :func:`remove_temporaries` recognizes it. On return, both content and name
    are on the disk and survive a power failure.

    A symlink is kept and its target replaced. A device or pipe is written to.

    Raises:
        OSError: the file could not be written; ``path`` is unchanged and the temporary file removed.
    """
    if _is_stream(path):
        with _copying_to(path) as part:
            yield part
        return
    named, path = path, Path(os.path.realpath(path)) if path.is_symlink() else path
    # The suffix is kept: image writers take the format from it.
    stem = os.fsdecode(os.fsencode(path.stem)[:LONGEST_STEM])
    part = path.with_name(f".{stem}.{os.getpid()}-{secrets.token_hex(4)}.part{path.suffix}")
    try:
        with naming(named, part):
            yield part
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            part.replace(path)
            _sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def check_output(option: str, path: Path) -> None:
    """Check that a file can be written, before the work for it is done.

    Args:
        option: name of the path in error messages.
        path: of the file.

    Raises:
        DfkdError: the path is a folder, or its folder does not exist or is not writable.
    """
    if path.is_dir():
        raise DfkdError(f"{option} {path} is a folder, and must be a file")
    if _is_stream(path):
        return
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise DfkdError(f"{option} {path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise DfkdError(f"{option} {path}: the folder {folder} cannot be written")


def _is_stream(path: Path) -> bool:
    """Whether a path is written to instead of replaced: a device, a pipe, or an open file descriptor."""
    if DESCRIPTOR.fullmatch(str(path.absolute())):
        return True
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return False


@contextmanager
def _copying_to(path: Path) -> Iterator[Path]:
    """Yields a temporary path whose content is copied to a device or pipe on exit."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / (path.name or "part")
        yield part
        with naming(path), _open_stream(path) as stream:
            stream.write(part.read_bytes())


def _open_stream(path: Path) -> IO[bytes]:
    """Open a path of :func:`_is_stream`; an open file descriptor is duplicated, to append to it."""
    if match := DESCRIPTOR.fullmatch(str(path.absolute())):
        sys.stdout.flush()
        return os.fdopen(os.dup({"stdout": 1, "stderr": 2}.get(match[1]) or int(match[1].rpartition("/")[2])), "wb")
    return path.open("wb")


@contextmanager
def naming(path: Path, part: Path | None = None) -> Iterator[None]:
    """Set the file name of an OSError from inside to ``path``, if it has none or that of the temporary file ``part``."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename in (None, part and str(part)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def is_temporary(path: Path) -> bool:
    """Whether a file's name is that of a temporary file of :func:`replacing`."""
    return TEMPORARY.fullmatch(path.name) is not None


def remove_temporaries(folder: Path) -> None:
    """Delete temporary files of processes that no longer run; errors are ignored."""
    with suppress(OSError):
        for path in list(folder.iterdir()):
            match = TEMPORARY.fullmatch(path.name)
            if match and not _other_process_lives(int(match["pid"])):
                with suppress(OSError):
                    path.unlink()


def make_folders(path: Path) -> list[Path]:
    """Create a folder and its parents.

    Returns:
        The folders that this call created, outermost first.
    """
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


def _other_process_lives(pid: int) -> bool:
    if pid == os.getpid():  # in a container, process ids are reused
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
    except PermissionError:  # a folder may be writable and not readable
        return
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every file system supports it
            raise
    finally:
        os.close(opened)
