"""Provenance of a measurement: commit, device and versions."""

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

__all__ = ["KERNELS", "LOADERS", "LOOPS", "QUANTIZERS", "ROOT", "Provenance", "commit", "file_name", "measured_on", "version"]

ROOT = Path(__file__).parent.parent
KERNELS = ("device", "threads", "load", "torch", "triton", "numba", "commit", "command")
"""Columns of a provenance in tables of kernels and in files of records, in this order."""
LOOPS = ("device", "load", "torch", "commit", "command")
"""Columns of a provenance in tables of whole iterations."""
LOADERS = ("device", "load", "torch", "dali", "commit", "command")
"""Columns of a provenance in tables of loaders."""
QUANTIZERS = ("device", "load", "torch", "torchao", "commit", "command")
"""Columns of a provenance in tables of quantized networks."""


@dataclass(frozen=True)
class Provenance:
    """Device, versions, commit and command of a measurement."""

    device: str
    threads: int
    """Number of PyTorch's threads."""
    load: float
    """Load average of the minute before the run; timings on a busy machine are unreliable."""
    torch: str
    triton: str
    """Version, empty if not installed; likewise numba, dali and torchao."""
    numba: str
    dali: str
    torchao: str
    commit: str
    command: str

    def columns(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the given fields by name, in this order."""
        return {name: getattr(self, name) for name in names}


def measured_on(device: torch.device | str, command: str, known_commit: str | None = None) -> Provenance:
    """Return the provenance of a measurement that starts now.

    Args:
        device: device, or its name.
        command: command line.
        known_commit: commit that is measured; by default git's.
    """
    return Provenance(
        device=device if isinstance(device, str) else device_name(device),
        threads=torch.get_num_threads(),
        load=round(os.getloadavg()[0], 2),
        torch=str(torch.__version__),
        triton=version("triton"),
        numba=version("numba"),
        dali=version("nvidia-dali-cuda130"),
        torchao=version("torchao"),
        commit=known_commit or commit(),
        command=command,
    )


def commit() -> str:
    """Return ``git describe`` with ``-dirty`` if files other than results and documents differ; ``unknown`` outside a git checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results", ":!README.md", ":!docs")
        return git("describe", "--always") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def file_name(device: torch.device | str) -> str:
    """Return the name of a device, or the given name, as part of a file name."""
    name = device if isinstance(device, str) else device_name(device)
    return re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")


def version(distribution: str) -> str:
    """Return the version of a package; empty if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
