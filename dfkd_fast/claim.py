"""Chooses the folder of a run and claims it for this process."""

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
    """Claim a folder for this process.

    Returns:
        The folder, and whether a run is resumed there.

    Raises:
        DfkdError: as :func:`open_run`.
    """
    path, job = default if out is None else out, _job()
    try:
        # After a process has died, torchrun starts the same command again.
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
    """Claim and return the first unused folder of ``default``, ``default-2``, …"""
    for number in count(1):
        folder = RunFolder(_name(default, number))
        if not folder.is_unused:
            continue
        try:
            folder.claim(job)
        except FolderInUseError:
            continue
        # Without locks, only a folder that this process has created is its own.
        if folder.is_unused and (folder.lockable or folder.is_new):
            return folder
        folder.release()
    raise AssertionError("unreachable: count() does not end")


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
        advice = "choose another folder" + (", or resume that run with --resume" if folder.holds_run else "")
        raise DfkdError(f"--out {folder.path} already exists: {advice}")


def _job() -> str:
    """Returns the name of this process's torchrun job, which a restart keeps; empty without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    # Jobs without a name are all called "none"; the launcher's process id is unique and outlives its workers.
    return f"launcher {os.getppid()} on {socket.gethostname()}" if name == "none" else name


def _name(default: Path, number: int) -> Path:
    """Returns the folder of a number: runs/digits, runs/digits-2, runs/digits-3."""
    return default if number == 1 else default.with_name(f"{default.name}-{number}")


def _numbered(default: Path) -> list[Path]:
    """Returns the existing folders ``default``, ``default-2``, …, oldest first; numbers of removed runs are missing."""
    folders = {1: default} if default.exists() else {}
    for path in default.parent.iterdir() if default.parent.is_dir() else ():
        if match := re.fullmatch(rf"{re.escape(default.name)}-([1-9]\d*)", path.name):
            folders[int(match[1])] = path
    return [folders[number] for number in sorted(folders)]
