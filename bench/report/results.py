"""The files in bench/results."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from .. import table

__all__ = ["Results", "grouped", "is_gpu"]

Row = TypeVar("Row", bound=Mapping[str, Any])


@dataclass(frozen=True)
class Results:
    """The files of a folder of results."""

    folder: Path

    @cached_property
    def runs(self) -> list[dict[str, Any]]:
        """Summaries of runs, on all devices."""
        path = self.folder / "distill.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def rows(self, kind: str, on: Literal["cpu", "gpu"]) -> list[dict[str, str]]:
        """The rows of the tables of a kind, such as "micro": of all CPUs or of all GPUs."""
        paths = sorted(self.folder.glob(f"{kind}-*.csv"))
        return [row for path in paths for row in table.read(path) if is_gpu(row["device"]) is (on == "gpu")]

    @cached_property
    def gpus(self) -> list[dict[str, Any]]:
        """Summaries of ``python -m bench gpu``, one per device: see ``summaries.summarize``."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("gpu-*.json"))]

    @cached_property
    def newest(self) -> dict[str, str]:
        """The commit of each GPU's last import; values of another commit are marked with it."""
        return {summary["device"]: summary["commit"] for summary in self.gpus}


def is_gpu(device: str) -> bool:
    """Whether a device name is a GPU's: a CPU's ends with its number of threads (``engine.device.device_name``)."""
    return re.search(r", \d+ threads$", device) is None


def grouped(rows: Iterable[Row], names: Sequence[str]) -> list[list[Row]]:
    """Rows with equal values in the given columns together, in the order of their first one."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return list(groups.values())
