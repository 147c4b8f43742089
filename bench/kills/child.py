"""``dfkd-fast`` in a process that kills itself at a chosen file operation: ``python -m bench.kills.child ORDER ARGUMENT...``.

ORDER is an :class:`Order` as JSON. Linux only: the path behind a file descriptor is read from /proc.
"""

import builtins
import io
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

__all__ = ["RUN_BEGINS", "STAGES", "AtCall", "Call", "Order", "Watch", "file_kind"]

STAGES = dict.fromkeys(("fsync", "replace", "unlink", "mkdir"), ("before", "after")) | {"write": ("before", "middle", "after")}
"""Points of a call at which a process can be killed; in the middle of a write, half of the data is in the file."""
RUN_BEGINS = ("recipe.toml", "replace")
"""The file operation directly before the teacher's training."""
NAMES = ("student-best-on-test.safetensors", "student.safetensors", "teacher.safetensors", "recipe.toml", "metrics.jsonl", "summary.json")
Result = TypeVar("Result")


@dataclass(frozen=True)
class AtCall:
    """A file operation of the process, and the point in it at which the process is killed."""

    file: str
    """A :func:`file_kind`, or ``folder`` if the call is ``mkdir``."""
    call: str
    """One of ``STAGES``."""
    number: int
    """Index of the call among those on this kind of file, from 1."""
    stage: str

    def __str__(self) -> str:
        return f"{self.stage} {self.call} {self.number} of {self.file}"


class Call(NamedTuple):
    """An observed file operation."""

    seconds: float
    """Seconds since the end of the imports."""
    file: str
    call: str


@dataclass(frozen=True)
class Order:
    """Instructions for the process."""

    folder: str
    """Absolute path of the run folder, the only one that is watched."""
    ready: int
    """File descriptor to which ``start`` is written after the imports, and ``teacher`` directly before the teacher's training."""
    record: str
    """JSON file for the observed calls, if the process ends by itself; empty for none."""
    kill: AtCall | None

    def to_json(self) -> str:
        """Return the order as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Order":
        """Return the order from the JSON of :meth:`to_json`."""
        fields = json.loads(text)
        return cls(**fields | {"kill": AtCall(**fields["kill"]) if fields["kill"] else None})


def file_kind(folder: str, path: str) -> str | None:
    """Return which of a run's files a path is, or is a temporary version of; None outside the folder."""
    relative = os.path.relpath(path, folder)
    if relative == ".." or relative.startswith("../"):
        return None
    parent, name = os.path.split(relative)
    if parent.startswith("checkpoints"):
        return "teacher checkpoint" if parent.endswith("teacher") else "checkpoint"
    if parent.startswith("tensorboard"):
        return "tensorboard"
    if name.endswith(".png"):
        return "png"
    return next((known for known in NAMES if known.partition(".")[0] in name), "other")


class Watch:
    """Counts the file operations in a folder, and kills the process at one of them.

    Args:
        folder: absolute path of the folder to watch.
        kill: where to kill the process; None to not kill it.
        on_call: called with the kind of file and the operation, after each operation.
    """

    def __init__(self, folder: str, kill: AtCall | None, on_call: Callable[[str, str], None] = lambda file, call: None) -> None:
        self.folder = folder
        self.kill = kill
        self.on_call = on_call
        self.calls: list[Call] = []
        self.begin = time.perf_counter()
        self._counts: Counter[tuple[str, str]] = Counter()

    def install(self) -> None:
        """Wrap Python's functions that change files, for the rest of the process."""
        builtins.open = io.open = partial(self._open, io.open)
        os.replace = partial(self._move, os.replace)
        os.rename = partial(self._move, os.rename)
        os.mkdir = partial(self._at_path, "mkdir", os.mkdir)
        os.unlink = os.remove = partial(self._at_path, "unlink", os.unlink)
        os.fsync = partial(self._fsync, os.fsync)
        os.write = partial(self._write_descriptor, os.write)

    def _open(self, function: Callable[..., Any], file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        stream = function(file, mode, *arguments, **options)
        if set(mode) & set("wxa+"):
            path, write = _path(file), stream.write

            def write_now(data: Any) -> int:
                written = write(data)
                stream.flush()
                return written

            def watched(data: Any) -> int:
                half = data[: len(data) // 2]
                return self._call("write", path, partial(write, data), middle=partial(write_now, half), finish=stream.flush)

            stream.write = watched
        return stream

    def _write_descriptor(self, function: Callable[..., int], descriptor: int, data: Any) -> int:
        half = memoryview(data)[: len(data) // 2]
        return self._call("write", _path(descriptor), partial(function, descriptor, data), middle=partial(function, descriptor, half))

    def _move(self, function: Callable[..., None], source: Any, target: Any, **options: Any) -> None:
        self._call("replace", _path(target), partial(function, source, target, **options))

    def _at_path(self, call: str, function: Callable[..., None], path: Any, *arguments: Any, **options: Any) -> None:
        self._call(call, _path(path), partial(function, path, *arguments, **options))

    def _fsync(self, function: Callable[..., None], file: Any) -> None:
        self._call("fsync", _path(file if isinstance(file, int) else file.fileno()), partial(function, file))

    def _call(
        self,
        call: str,
        path: str,
        function: Callable[[], Result],
        middle: Callable[[], object] = lambda: None,
        finish: Callable[[], object] = lambda: None,
    ) -> Result:
        file = file_kind(self.folder, path)
        if file is None:
            return function()
        if call == "mkdir":
            file = "folder"
        self._counts[file, call] += 1
        self.calls.append(Call(time.perf_counter() - self.begin, file, call))
        kill = self.kill
        if kill is None or (kill.file, kill.call, kill.number) != (file, call, self._counts[file, call]):
            result = function()
            self.on_call(file, call)
            return result
        if kill.stage == "middle":
            middle()
        if kill.stage == "after":
            with suppress(OSError):  # a file to remove may not exist, which its caller may accept
                function()
                finish()
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("nothing survives SIGKILL")


def _path(file: Any) -> str:
    return os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.path.abspath(os.fsdecode(file))  # noqa: PTH100, PTH115


def _main() -> None:
    order = Order.from_json(sys.argv[1])
    sys.argv = ["dfkd-fast", *sys.argv[2:]]
    write = os.write
    replaced: list[str] = []

    def on_call(file: str, call: str) -> None:
        if (file, call) == RUN_BEGINS and not replaced:
            replaced.append(file)
            write(order.ready, b"teacher\n")

    watch = Watch(order.folder, order.kill, on_call)
    watch.install()
    from dfkd_fast.cli import main  # its imports take most of the start

    write(order.ready, b"start\n")
    watch.begin = time.perf_counter()
    try:
        main()
    finally:
        if order.record:
            Path(order.record).write_text(json.dumps({"seconds": time.perf_counter() - watch.begin, "calls": watch.calls}))


if __name__ == "__main__":
    _main()
