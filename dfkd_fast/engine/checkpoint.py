"""Checkpoints on disk: whole or absent, the newest few, read without running anything from them."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from dfkd_fast.errors import DfkdError, first_line
from dfkd_fast.files import replacing

__all__ = ["latest_checkpoint", "load_checkpoint", "save_checkpoint"]

KEPT = 2


def save_checkpoint(state: dict[str, Any], folder: Path, iteration: int) -> Path:
    """Write a state of tensors, numbers and containers; older checkpoints than the newest two are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"iteration-{iteration:08d}.pt"
    # Through memory: torch.save to a file turns a full disk into an assertion of its own.
    content = io.BytesIO()
    torch.save(state, content)
    with replacing(path) as part:
        part.write_bytes(content.getbuffer())
    for old in _checkpoints(folder)[:-KEPT]:
        old.unlink()
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the most iterations, if there is any."""
    return next(reversed(_checkpoints(folder)), None)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a state onto the CPU.

    Raises:
        DfkdError: the file is no checkpoint of this program, or damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise DfkdError(f"checkpoint {path} cannot be read: {first_line(error)}") from error


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("iteration-*.pt"))
