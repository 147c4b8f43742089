"""Checkpoint files: written atomically with a checksum, limited to the newest two, loaded without executing pickled code."""

import hashlib
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dfkd_fast.errors import DfkdError
from dfkd_fast.files import replacing

__all__ = ["Loaded", "latest_checkpoint", "load_checkpoint", "load_latest", "rename_damaged", "save_checkpoint"]

MAX_CHECKPOINTS = 2
NAME = re.compile(r"iteration-(\d+)\.pt")
# Appended to the output of torch.save, whose readers ignore it: a separate file could not be replaced atomically with it.
CHECKSUM_PREFIX = b"\nsha256 "
TRAILER_BYTES = len(CHECKSUM_PREFIX) + 64 + 1
END_OF_ZIP, END_OF_ZIP_BYTES = b"PK\x05\x06", 22


class Loaded(NamedTuple):
    """Newest readable checkpoint."""

    path: Path
    state: dict[str, Any]
    damaged: dict[Path, str]
    """Newer checkpoints that are damaged, newest first, with the error message of each."""


def save_checkpoint(state: dict[str, Any], folder: Path, iteration: int) -> Path:
    """Saves a state atomically and removes all but the newest two checkpoints up to this iteration.

    Older checkpoints are removed only after the new one is on disk, so a complete checkpoint exists at any time.

    Args:
        state: State of tensors, numbers and containers.
        folder: Folder of the checkpoints; created if missing.
        iteration: Number of completed iterations, part of the file name.

    Returns:
        Path of the checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"iteration-{iteration:08d}.pt"
    # Through memory: torch.save to a file reports a full disk as an internal assertion.
    content = io.BytesIO()
    torch.save(state, content)
    checksum = hashlib.sha256(content.getbuffer()).hexdigest()
    content.write(CHECKSUM_PREFIX + checksum.encode() + b"\n")
    with replacing(path) as part:
        part.write_bytes(content.getbuffer())
    for old in [other for other in _checkpoints(folder) if _iteration(other) <= iteration][:-MAX_CHECKPOINTS]:
        old.unlink(missing_ok=True)
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """Returns the path of the newest checkpoint, which may be damaged; None if there is none."""
    return next(reversed(_checkpoints(folder)), None)


def load_latest(folder: Path) -> Loaded | None:
    """Loads the newest undamaged checkpoint; returns None if there are no checkpoints.

    Raises:
        DfkdError: All checkpoints are damaged, or permission to read one is denied.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(_checkpoints(folder)):
        try:
            return Loaded(path, load_checkpoint(path), damaged)
        except DfkdError as error:
            if isinstance(error.__cause__, PermissionError):  # not damaged: another user can read it
                raise
            damaged[path] = str(error)
    if damaged:
        raise DfkdError(f"{'; '.join(damaged.values())}; move {folder} away to restart this training")
    return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Verifies the checksum of a checkpoint and returns its state on the CPU.

    Checkpoints of early versions have no checksum and are loaded without verification.

    Raises:
        DfkdError: The file cannot be read, is damaged or is not a checkpoint.
    """
    try:
        problem = _problem(path)
    except OSError as error:
        raise DfkdError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    if problem is None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(state, dict):
                return state
            problem = "it does not contain a state"
        except MemoryError:
            raise
        except Exception:
            # Damaged files raise various exceptions, and the message for a rejected pickle advises to trust the file.
            problem = "it is damaged, or contains objects other than tensors, numbers and containers"
    raise DfkdError(f"checkpoint {path} cannot be read: {problem}")


def rename_damaged(path: Path) -> Path:
    """Renames a damaged checkpoint, so that it is ignored from now on; returns its new path."""
    return path.replace(path.with_name(f"{path.name}.damaged"))


def _problem(path: Path) -> str | None:
    """Returns a description of what is wrong with a file, or None if its checksum matches."""
    size = path.stat().st_size
    if size == 0:
        return "it is empty"
    digest = hashlib.sha256()
    with path.open("rb") as file:
        remaining = max(0, size - TRAILER_BYTES)
        while remaining and (chunk := file.read(min(remaining, 1 << 20))):
            digest.update(chunk)
            remaining -= len(chunk)
        trailer = file.read()
        file.seek(max(0, size - END_OF_ZIP_BYTES))
        end = file.read()
    if trailer.startswith(CHECKSUM_PREFIX):
        return None if trailer == CHECKSUM_PREFIX + digest.hexdigest().encode() + b"\n" else "its content does not match its checksum"
    # A complete file of torch.save without a checksum was written by an early version.
    return None if end.startswith(END_OF_ZIP) else "it is truncated or not a checkpoint"


def _iteration(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def _checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints in a folder, oldest first; other files are ignored."""
    # Not glob: it returns nothing for a folder without read permission, and the training would restart.
    entries = list(folder.iterdir()) if folder.exists() else []
    return sorted((path for path in entries if NAME.fullmatch(path.name) and path.is_file()), key=_iteration)
