"""Which folder a run takes, for itself alone."""

import os
import re
import socket
from itertools import count
from pathlib import Path

from . import distributed
from .errors import DfkdError
from .locks import FolderInUseError, FolderLock
from .report import RunFolder

__all__ = ["claim_folder", "claim_free"]


def claim_folder(out: Path | None, default: Path, resume: bool) -> tuple[RunFolder, bool]:
    """The folder, claimed by this process, and whether a run goes on there.

    Raises:
        DfkdError: as :func:`open_run`.
    """
    path, job = default if out is None else out, _job()
    try:
        # torchrun starts the very same command again where a process has died.
        candidates = ([out] if out is not None else _numbered(default)) if distributed.restarted() else []
        if mine := [folder for folder in candidates if FolderLock.job_of(folder) == job]:
            path = mine[-1]
            resume = resume or RunFolder(path).holds_run
        elif out is None and resume:
            path = next((other for other in reversed(_numbered(default)) if RunFolder(other).holds_run), default)
        elif out is None:
            return claim_free(default, job), False
        folder = RunFolder(path)
        _check_content(folder, resume)
        folder.claim(job)
        try:
            _check_content(folder, resume)  # now that nobody else can change it
        except BaseException:
            folder.release()
            raise
        return folder, resume
    except FolderInUseError as error:
        raise DfkdError(f"--out {path} is {error}: {'wait for it' if resume else 'choose another folder'}") from error
    except OSError as error:
        where = "" if error.filename in (None, str(path)) else f" ({error.filename})"
        raise DfkdError(f"--out {path} cannot be written: {error.strerror}{where}") from error


def claim_free(default: Path, job: str) -> RunFolder:
    """The first folder of the default's names that nobody uses."""
    for number in count(1):
        folder = RunFolder(_name(default, number))
        if not folder.is_unused:
            continue
        try:
            folder.claim(job)
        except FolderInUseError:
            continue
        # Without locks only the one that has made it can be alone there.
        if folder.is_unused and (folder.lockable or folder.is_new):
            return folder
        folder.release()
    raise AssertionError("there are numbers enough")


def _check_content(folder: RunFolder, resume: bool) -> None:
    if resume:
        if not folder.holds_run:
            raise DfkdError(f"--resume: {folder.path} holds no run (no recipe.toml)")
        try:
            folder.check_recipe()
        except DfkdError as error:
            raise DfkdError(f"--resume: {error}") from error
    elif folder.path.exists() and not folder.path.is_dir():
        raise DfkdError(f"--out {folder.path} is a file, and must be a folder")
    elif not folder.is_unused:
        advice = "choose another folder" + (", or go on with that run by --resume" if folder.holds_run else "")
        raise DfkdError(f"--out {folder.path} already exists: {advice}")


def _job() -> str:
    """The name of the torchrun job this process is of, the same after a restart; empty without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    # Jobs that were given no name are all called "none"; but the launcher outlives its workers.
    return f"launcher {os.getppid()} on {socket.gethostname()}" if name == "none" else name


def _name(default: Path, number: int) -> Path:
    """What a default name stands for: runs/digits, runs/digits-2, runs/digits-3."""
    return default if number == 1 else default.with_name(f"{default.name}-{number}")


def _numbered(default: Path) -> list[Path]:
    """The folders a default name stands for, oldest first; numbers may be left out, of runs that failed before they began."""
    found = {1: default} if default.exists() else {}
    for path in default.parent.iterdir() if default.parent.is_dir() else ():
        if match := re.fullmatch(rf"{re.escape(default.name)}-([1-9]\d*)", path.name):
            found[int(match[1])] = path
    return [found[number] for number in sorted(found)]
