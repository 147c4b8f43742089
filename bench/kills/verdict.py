"""Whether a run that was killed and resumed is the run that was never killed."""

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
"""Keys of metrics.jsonl and summary.json: measured, not computed."""


@dataclass(frozen=True)
class Verdict:
    """On one trial."""

    outcome: Outcome
    why: str = ""
    """It failed, or what the refusal says."""


@dataclass(frozen=True)
class Reference:
    """What a run that was never killed left."""

    hashes: Mapping[str, str]
    """By file: of what a repetition must reproduce."""
    names: frozenset[str]
    """Of all files, with ``#`` for what differs between repetitions in the names of TensorBoard's."""

    @classmethod
    def of(cls, folder: Path) -> "Reference":
        """Of a finished run's folder."""
        files = [path for path in folder.rglob("*") if path.is_file()]
        compared = {path: reader for path in files if (reader := _reader(path)) is not None}
        hashes = {str(path.relative_to(folder)): hashlib.sha256(reader(path)).hexdigest() for path, reader in compared.items()}
        return cls(hashes, frozenset(_name(path, folder) for path in files))

    def differences(self, folder: Path) -> list[str]:
        """What another run's folder has otherwise, a few words a file."""
        try:
            other = Reference.of(folder)
        except Exception as error:  # whatever a damaged file makes its reader raise
            return [f"a file cannot be read: {type(error).__name__}: {error}"]
        # Older checkpoints than the kept ones survive where a run was killed before it removed them.
        expected = {_any_iteration(name) for name in self.names}
        return [
            *(f"{name} is missing" for name in sorted(self.names - other.names)),
            *(f"{name} is left over" for name in sorted(other.names) if _any_iteration(name) not in expected),
            *(f"{name} differs" for name in sorted(self.hashes.keys() & other.hashes.keys()) if self.hashes[name] != other.hashes[name]),
        ]


def contents(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in a folder, by its path there; empty if there is no folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def judge(code: int, errors: str, before: Mapping[str, str], folder: Path, reference: Reference) -> Verdict:
    """The verdict on the last command of a trial.

    Args:
        code: its exit code; minus the number of the signal that killed it.
        errors: what it wrote to standard error.
        before: ``contents`` of the folder when it began.
        folder: of the run.
        reference: what the folder must hold if the command succeeded.
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
    """Without the metadata, in which a teacher has the seconds of its training."""
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
