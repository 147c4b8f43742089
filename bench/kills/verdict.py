"""Compares a run that was killed and resumed with an uninterrupted run."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file

__all__ = ["Outcome", "Reference", "Verdict", "contents", "judge"]

Outcome = Literal["identical", "refused", "FAILED"]
UNREPEATABLE = ("seconds", "peak_memory_bytes", "peak_memory_bytes_by_phase")
"""Keys of metrics.jsonl and summary.json whose values are measured, and differ between runs."""


@dataclass(frozen=True)
class Verdict:
    """Outcome of one trial."""

    outcome: Outcome
    why: str = ""
    """Reason of the failure, or message of the refusal."""


@dataclass(frozen=True)
class Reference:
    """Files of an uninterrupted run."""

    hashes: Mapping[str, str]
    """Hashes by file, of the contents that a repetition must reproduce."""
    names: frozenset[str]
    """Names of all files; the parts of TensorBoard's file names that differ between runs are replaced by ``#``."""

    @classmethod
    def of(cls, folder: Path) -> "Reference":
        """Return the reference of a finished run's folder."""
        files = [path for path in folder.rglob("*") if path.is_file()]
        compared = {path: reader for path in files if (reader := _reader(path)) is not None}
        hashes = {str(path.relative_to(folder)): hashlib.sha256(reader(path)).hexdigest() for path, reader in compared.items()}
        return cls(hashes, frozenset(_name(path, folder) for path in files))

    def differences(self, folder: Path) -> list[str]:
        """Return the differences of another run's folder, one string per file."""
        try:
            other = Reference.of(folder)
        except Exception as error:  # readers raise many types for a damaged file
            return [f"a file cannot be read: {type(error).__name__}: {error}"]
        # Older checkpoints remain if a run was killed before it removed them.
        expected = {_any_iteration(name) for name in self.names}
        return [
            *(f"{name} is missing" for name in sorted(self.names - other.names)),
            *(f"{name} is left over" for name in sorted(other.names) if _any_iteration(name) not in expected),
            *(f"{name} differs" for name in sorted(self.hashes.keys() & other.hashes.keys()) if self.hashes[name] != other.hashes[name]),
        ]


def contents(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder, by relative path; empty if there is no folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def judge(code: int, errors: str, before: Mapping[str, str], folder: Path, reference: Reference) -> Verdict:
    """Return the verdict on the last command of a trial.

    Args:
        code: exit code; negative signal number if killed by a signal.
        errors: standard error.
        before: ``contents`` of the folder before the command.
        folder: run folder.
        reference: expected files if the command succeeded.
    """
    if code == 0:
        differences = reference.differences(folder)
        return Verdict("FAILED", "; ".join(differences)) if differences else Verdict("identical")
    lines = errors.splitlines()
    if code != 2 or len(lines) != 1:
        return Verdict("FAILED", f"exit code {code}, {len(lines)} lines on standard error{f': {lines[-1]}' if lines else ''}")
    after = contents(folder)
    lost = [name for name, digest in before.items() if after.get(name) != digest]
    return Verdict("FAILED", f"refused, but {', '.join(lost)} lost or changed") if lost else Verdict("refused", lines[0])


def _name(path: Path, folder: Path) -> str:
    return re.sub(r"^tensorboard/events\.out\.tfevents\..*", "tensorboard/events.out.tfevents.#", str(path.relative_to(folder)))


def _any_iteration(name: str) -> str:
    return re.sub(r"iteration-\d+", "iteration-#", name)


def _reader(path: Path) -> Callable[[Path], bytes] | None:
    readers = {".safetensors": _tensors, ".jsonl": _records, ".json": _record, ".toml": Path.read_bytes, ".png": Path.read_bytes}
    return None if path.name.startswith(".") else readers.get(path.suffix)


def _tensors(path: Path) -> bytes:
    """Return the tensors without the metadata, which has the duration of a teacher's training."""
    parts = [
        f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + tensor.numpy().tobytes()
        for name, tensor in sorted(load_file(path).items())
    ]
    return b"".join(parts)


def _records(path: Path) -> bytes:
    return b"\n".join(_repeatable(json.loads(line)) for line in path.read_text().splitlines())


def _record(path: Path) -> bytes:
    return _repeatable(json.loads(path.read_text()))


def _repeatable(record: dict[str, Any]) -> bytes:
    return json.dumps({key: value for key, value in record.items() if key not in UNREPEATABLE}, sort_keys=True).encode()
