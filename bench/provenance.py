"""Where a figure comes from: the commit, the device and the versions behind it."""

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dfkd_fast.engine.device import device_name

__all__ = ["KERNELS", "LOADERS", "LOOPS", "ROOT", "Provenance", "commit", "file_name", "measured_on", "version"]

ROOT = Path(__file__).parent.parent
KERNELS = ("device", "threads", "load", "torch", "triton", "numba", "commit", "command")
"""What the tables of kernels, and files of records, hold of a provenance, in this order."""
LOOPS = ("device", "load", "torch", "commit", "command")
"""What the tables of whole iterations hold of it."""
LOADERS = ("device", "load", "torch", "dali", "commit", "command")
"""What the tables of loaders hold of it."""


@dataclass(frozen=True)
class Provenance:
    """Where and with what a figure was measured."""

    device: str
    threads: int
    """Of PyTorch."""
    load: float
    """Processes that wanted a core in the minute before the run: of a busy machine no time is worth much."""
    torch: str
    triton: str
    """Empty if it is not installed, as numba and dali."""
    numba: str
    dali: str
    commit: str
    command: str

    def columns(self, names: Sequence[str]) -> dict[str, Any]:
        """These fields by name, in this order."""
        return {name: getattr(self, name) for name in names}


def measured_on(device: torch.device | str, command: str, known_commit: str | None = None) -> Provenance:
    """The provenance of what is measured now.

    Args:
        device: or its name.
        command: the command line.
        known_commit: what is measured, where git cannot tell.
    """
    return Provenance(
        device=device if isinstance(device, str) else device_name(device),
        threads=torch.get_num_threads(),
        load=round(os.getloadavg()[0], 2),
        torch=str(torch.__version__),
        triton=version("triton"),
        numba=version("numba"),
        dali=version("nvidia-dali-cuda130"),
        commit=known_commit or commit(),
        command=command,
    )


def commit() -> str:
    """The commit checked out, with ``-dirty`` if other files than results and their documents differ; "unknown" outside a git checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results", ":!README.md", ":!docs")
        return git("describe", "--always") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def file_name(device: torch.device | str) -> str:
    """The name of a device, which may be given instead of it, as part of a file's name."""
    name = device if isinstance(device, str) else device_name(device)
    return re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")


def version(distribution: str) -> str:
    """Of an installed package; empty if it is not."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
