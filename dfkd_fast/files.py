"""Writing files and folders so that a crash, a full disk or a Ctrl-C never leaves half of one."""

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
"""Replacing a file that the shell has sent the output to would lose what else is written there."""
LONGEST_STEM = 200
"""Bytes of a name in that of its temporary file, which may have 255."""
TEMPORARY = re.compile(r"\..+\.(?P<pid>\d+)-[0-9a-f]{8}\.part(\.[^.]*)?")


def expanded(path: str | Path) -> Path:
    """A path with ``~`` in front replaced by the home folder that it means; as it is where there is none, as of an unknown user."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  # pathlib's raises


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file that appears whole or not at all: write to the path given here; it takes ``path``'s place at the end.

    The temporary file has a name of its own, so that no other process writes to it; :func:`remove_temporaries` knows it again.
    When this returns, both content and name have reached the disk: a power failure loses neither.

    A symlink stays one: the file that it names is replaced. What is no regular file, a device or a pipe, is written to.

    Raises:
        OSError: it could not be written; what stood at ``path`` is untouched and nothing is left beside it.
    """
    if _is_stream(path):
        with _copying_to(path) as part:
            yield part
        return
    named, path = path, Path(os.path.realpath(path)) if path.is_symlink() else path
    # The suffix stays at the end: writers of pictures take the format from it.
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
    """Find out, before the work for it is done, whether a file can be written.

    Args:
        option: that names it, as an error calls it.
        path: of the file.

    Raises:
        DfkdError: it is a folder, or in none that can be written.
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
    """Whether a path is written to rather than replaced: a device, a pipe, or what this process has open already."""
    if DESCRIPTOR.fullmatch(str(path.absolute())):
        return True
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return False


@contextmanager
def _copying_to(path: Path) -> Iterator[Path]:
    """A file whose content goes to a device or a pipe in the end."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / (path.name or "part")
        yield part
        with naming(path), _open_stream(path) as stream:
            stream.write(part.read_bytes())


def _open_stream(path: Path) -> IO[bytes]:
    """Open what :func:`_is_stream` knows; what this process has open already, behind what it has written there."""
    if found := DESCRIPTOR.fullmatch(str(path.absolute())):
        sys.stdout.flush()
        return os.fdopen(os.dup({"stdout": 1, "stderr": 2}.get(found[1]) or int(found[1].rpartition("/")[2])), "wb")
    return path.open("wb")


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
