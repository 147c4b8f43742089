"""Invented records of python -m bench gpu on two GPUs, and helpers to read the documents generated from them."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.gpu.records import Record, Status
from bench.micro.rows import Row
from bench.provenance import ROOT, measured_on
from bench.report.markdown import END
from bench.report.results import Results
from bench.table import cells

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
COMMAND = "python -m bench gpu --minutes 9 --out /scratch/out"


class Device:
    """Creates records of a GPU, with all times multiplied by ``slowness``."""

    def __init__(self, name: str, slowness: float, commit: str = "abc1234", rehearsal: bool = False) -> None:
        self.slowness = slowness
        # The load is given, as this machine's changes while a test runs.
        versions = {"load": 0.25, "torch": "2.11.0", "triton": "3.6.0", "numba": ""}
        self.origin: dict[str, Any] = {"device": name, **versions, "commit": commit, "command": COMMAND, "rehearsal": rehearsal}

    def record(
        self, stage: str, case: str, status: Status = "ok", text: str = "", table: str = "", row: dict[str, Any] | None = None
    ) -> Record:
        return Record(stage, case, status, text, table=table, row=row or {}, origin=self.origin)

    def kernel(self, provider: str, microseconds: float, status: str = "ok", **others: Any) -> Record:
        timed: dict[str, Any] = (
            {"median_us": microseconds * self.slowness, "share_of_copy": 0.91, "timed": "graph replay"} if status.startswith("ok") else {}
        )
        shared = {name: value for name, value in self.origin.items() if name != "rehearsal"}
        case: dict[str, Any] = {
            "kernel": "ema",
            "variant": "plain",
            "mode": "update",
            "size": "resnet50",
            "dtype": "float32",
            "layout": "contiguous",
        }
        row = cells(Row(**case, provider=provider, status=status, **timed, provenance=measured_on("", "", "abc"))) | shared | others
        recorded: Status = "ok" if timed else "wrong"
        return self.record("micro", f"ema resnet50 / {provider}", recorded, status, table="micro", row=row)

    def contender(self, name: str, seconds: float, **others: Any) -> Record:
        row: dict[str, Any] = {
            "recipe": "cifar10-dfad",
            "batch_size": 256,
            "precision": "bf16",
            "contender": name,
            "turns": 5,
            "peak_memory_mib": 1234.5,
            "autocast": "bf16",
            "tf32": "convolutions",
        }
        row |= {"seconds_per_iteration": seconds * self.slowness, "device": self.origin["device"], "commit": self.origin["commit"]}
        return self.record("end-to-end", f"cifar10-dfad {name}", table="end-to-end", row=row | others)

    def profiled(self, contender: str, rank: int) -> Record:
        row: dict[str, Any] = {"recipe": "cifar10-dfad", "batch_size": 256, "contender": contender, "rank": rank, "share": 0.05}
        row |= {"name": f"{contender}_{rank}<float>", "calls_per_iteration": 7.0, "us_per_iteration": (99 - rank) * self.slowness}
        return self.record("end-to-end", f"cifar10-dfad {contender}: kernel {rank}", table="kernels", row=row)

    def run(self, seed: int, last: float) -> Record:
        retention = {"last": last, "best": last + 0.5, "largest_drop": 0.25}
        row: dict[str, Any] = {"recipe": "mnist-dfad (3 of 60 epochs)", "seed": seed, "device": "cuda", "teacher_accuracy": 99.0}
        row |= {"retention": retention}
        row |= {"command": f"dfkd-fast distill mnist-dfad --seed {seed} --set loop.epochs=3", "seconds": {"total": 40 * self.slowness}}
        return self.record("accuracy", f"mnist-dfad seed {seed}", table="accuracy", row=row | {"device_name": self.origin["device"]})

    def everything(self) -> list[Record]:
        return [
            self.record("environment", "versions", table="host", row={"python": "3.12.3", "memory_gib": 80 * self.slowness}),
            self.record("environment", "copy bandwidth", table="ceilings", row={"gb_per_s": 4000 / self.slowness}),
            self.record("environment", "", row={"complete": True}),
            *(self.record("tests", f"tests/kernels/test_ema.py::test_{index}") for index in range(7)),
            self.record("tests", "tests/kernels/test_kl.py::test_wide", "failed", "AssertionError: 0.5 > 0.1"),
            self.record("tests", "tests/kernels/test_kl.py::test_flat", "failed", "AssertionError: 0.5 > 0.1"),
            self.record("tests", "tests/test_apex.py::test_adam", "skipped", "Skipped: needs apex"),
            self.record("tests", "", row={"complete": True}),
            self.kernel("eager", 40),
            self.kernel("foreach_lerp", 20),
            self.kernel("flat_lerp", 5, status="ok, without integer buffers"),
            self.kernel("cuda", 10),
            self.kernel("triton", 0, status="wrong: averages differ"),
            self.contender("plain", 0.8),
            self.contender("engine", 0.2),
            *(self.profiled("plain", rank) for rank in range(25)),
            *(self.profiled("engine", rank) for rank in range(25)),
            self.run(0, 98.0),
            self.run(1, 97.0),
        ]


def write(path: Path, records: Iterable[Record]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(record.line() + "\n" for record in records))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with the current documents and without results."""
    root = tmp_path / "root"
    for name in report.documents(Results(root)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    (root / "bench" / "results").mkdir(parents=True)
    report.main((), root)
    return root


def shown(root: Path, begin: str) -> str:
    """Return the table under a marker in a document."""
    name = next(name for name, sections in report.documents(Results(root)).items() if begin in sections)
    return (root / name).read_text().partition(begin)[2].partition(END)[0].strip()


def column(text: str, device: str) -> dict[tuple[str, ...], str]:
    """Return a device's cells in the first table, by the label cells of the row."""
    lines = text[text.index("| ") :].partition("\n\n")[0].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    labels = min(index for index, title in enumerate(rows[0]) if title in (H100, H200))
    return {tuple(row[:labels]): row[rows[0].index(device)] for row in rows[1:]}


def all_files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
