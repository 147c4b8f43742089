"""Where a figure comes from: the commit, the device and the versions behind it."""

import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from dfkd_fast.engine.device import device_name

__all__ = ["ROOT", "commit", "file_name", "version"]

ROOT = Path(__file__).parent.parent


def commit() -> str:
    """The commit checked out, with ``-dirty`` if other files than results and their documents differ; "unknown" outside a git checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results", ":!README.md", ":!docs/gpu.md")
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
