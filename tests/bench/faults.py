"""Campaigns of stages that fail. ``python -m tests.bench.faults`` runs all of them and prints the table."""

import tempfile
from pathlib import Path

from bench.gpu.folder import Folder
from bench.gpu.schedule import Campaign
from bench.gpu.stages import Stage

# The fault and its function in planted.py.
FAULTS = {
    "exception": "raising",
    "case": "failing_case",
    "hang": "hanging",
    "crash": "dying",
    "exit": "dying_at_once",
    "lost GPU": "losing_the_gpu",
    "wrong kernel": "wrong_kernel",
    "full disk": "full_disk",
}


def stage(name: str, function: str, *, limit: float = 60.0, needs: float = 0.0) -> Stage:
    return Stage(name, limit, limit, needs, f"tests.bench.planted:{function}")


def campaign(folder: Path, *stages: Stage, **options: object) -> Campaign:
    return Campaign(stages, Folder(folder / "kept", folder / "out"), origin={"commit": "abc"}, rehearse=True, **options)  # type: ignore[arg-type]


def all_faults(folder: Path, **options: object) -> Campaign:
    """Every fault, between two sound stages."""
    faults = [stage(name, function, limit=8.0 if name == "hang" else 60.0) for name, function in FAULTS.items()]
    return campaign(folder, stage("sound", "sound"), *faults, stage("sound at the end", "sound"), **options)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(*all_faults(Path(folder)).run(10.0), sep="\n")
