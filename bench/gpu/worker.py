"""The process of one stage: ``python -m bench.gpu.worker DESCRIPTOR``, which ``schedule.py`` starts.

It reads the job from standard input, as JSON, and writes records and the names of starting cases to the descriptor, one per line.
"""

import faulthandler
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import REHEARSAL
from .records import Record

__all__ = ["GPU_LOST", "main"]

GPU_LOST = 75
"""Exit code of a process that lost the GPU, which a new process may use."""


def main() -> None:
    """Run the stage, and write its own record last."""
    job: dict[str, Any] = json.load(sys.stdin)
    deadline = time.monotonic() + job["seconds"]
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    threading.Thread(target=_exit_with, args=(os.getppid(),), daemon=True).start()
    # If the stage hangs, the log gets a traceback.
    faulthandler.dump_traceback_later(max(0.5, job["seconds"]))
    with os.fdopen(descriptor, "w", buffering=1) as records:
        lock = threading.Lock()

        def write(line: str) -> None:
            with lock:
                records.write(line + "\n")

        try:
            _run(job, deadline, write)
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            write(Record(job["stage"], "", "failed", text, traceback.format_exc()[-4000:]).line())
            traceback.print_exc()
            sys.exit(1)


def _exit_with(parent: int) -> None:
    """Kill this process group when the parent process is gone, to free the GPU."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)


def _run(job: dict[str, Any], deadline: float, write: Callable[[str], None]) -> None:
    from .context import Context, GpuLostError

    if os.environ.get(REHEARSAL):
        from . import rehearsal

        rehearsal.prepare()
    context = Context(
        stage=job["stage"],
        device_type="cpu" if job["rehearse"] else "cuda",
        rehearse=job["rehearse"],
        deadline=deadline,
        send=lambda record: write(record.line()),
        announce=lambda case: write(json.dumps({"started": case})),
        done=frozenset(job["done"]),
        data_root=Path(job["data_root"]) if job["data_root"] else None,
        origin=job["origin"],
    )
    module, _, function = job["function"].partition(":")
    begin = time.monotonic()
    try:
        getattr(importlib.import_module(module), function)(context)
    except GpuLostError as error:
        print(f"this process has lost the GPU: {error}", file=sys.stderr)
        os._exit(GPU_LOST)  # Python's shutdown would wait for the GPU
    context.finish(time.monotonic() - begin)


if __name__ == "__main__":
    main()
