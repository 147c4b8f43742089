"""Checkpoints on disk: whole or absent, the newest few, with a checksum, and read without running anything from them."""

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
# Behind what torch.save wrote, whose readers do not mind: a file beside it could not be replaced together with it.
CHECKSUM_PREFIX = b"\nsha256 "
TRAILER_BYTES = len(CHECKSUM_PREFIX) + 64 + 1
END_OF_ZIP, END_OF_ZIP_BYTES = b"PK\x05\x06", 22


class Loaded(NamedTuple):
    """The newest checkpoint that can be read."""

    path: Path
    state: dict[str, Any]
    damaged: dict[Path, str]
    """Newer ones, newest first, and what is wrong with each."""


def save_checkpoint(state: dict[str, Any], folder: Path, iteration: int) -> Path:
    """Write a state of tensors, numbers and containers; of the older checkpoints only the one before it is kept.

    Those are removed once the new one is on the disk, content and name: whenever the process is killed, a whole one is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"iteration-{iteration:08d}.pt"
    # Through memory: torch.save to a file turns a full disk into an assertion of its own.
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
    """The checkpoint of the most iterations, if there is any; whether it can be read is not looked at."""
    return next(reversed(_checkpoints(folder)), None)


def load_latest(folder: Path) -> Loaded | None:
    """Read the newest checkpoint that is undamaged; None if there are none at all.

    Raises:
        DfkdError: there are some, and all are damaged; or one may not be read.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(_checkpoints(folder)):
        try:
            return Loaded(path, load_checkpoint(path), damaged)
        except DfkdError as error:
            if isinstance(error.__cause__, PermissionError):  # as good as any, for whoever may read it
                raise
            damaged[path] = str(error)
    if damaged:
        raise DfkdError(f"{'; '.join(damaged.values())}; with {folder} moved away this training begins anew")
    return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a state onto the CPU, after its checksum; checkpoints of versions that wrote none are read without.

    Raises:
        DfkdError: the file is no checkpoint of this program, or damaged.
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
            problem = "it holds no state"
        except MemoryError:
            raise
        except Exception:
            # What a damaged file raises has no common kind, and the text of a refused pickle advises to trust it.
            problem = "it is damaged, or holds more than tensors, numbers and containers"
    raise DfkdError(f"checkpoint {path} cannot be read: {problem}")


def rename_damaged(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it is neither read nor counted again; returns its new path."""
    return path.replace(path.with_name(f"{path.name}.damaged"))


def _problem(path: Path) -> str | None:
    """What is wrong with a file as a whole, if anything."""
    size = path.stat().st_size
    if size == 0:
        return "it is empty"
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = max(0, size - TRAILER_BYTES)
        while left and (chunk := file.read(min(left, 1 << 20))):
            digest.update(chunk)
            left -= len(chunk)
        trailer = file.read()
        file.seek(max(0, size - END_OF_ZIP_BYTES))
        end = file.read()
    if trailer.startswith(CHECKSUM_PREFIX):
        return None if trailer == CHECKSUM_PREFIX + digest.hexdigest().encode() + b"\n" else "its content does not match its checksum"
    # Without a checksum, but with the end that torch.save writes: of an earlier version.
    return None if end.startswith(END_OF_ZIP) else "it is truncated, or no checkpoint"


def _iteration(path: Path) -> int:
    found = NAME.fullmatch(path.name)
    return int(found[1]) if found else -1


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first; whatever else lies in the folder is none of them."""
    # Not glob: of a folder that may not be read it finds nothing, and the training would begin anew.
    entries = list(folder.iterdir()) if folder.exists() else []
    return sorted((path for path in entries if NAME.fullmatch(path.name) and path.is_file()), key=_iteration)
