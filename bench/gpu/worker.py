"""The process of one stage: ``python -m bench.gpu.worker DESCRIPTOR``, which ``schedule.py`` starts.

What to run is read from standard input, in JSON. Records, and the names of cases that begin, go to the descriptor, line by line.
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
"""Exit code where this process cannot use the GPU any more, but a new one may."""


def main() -> None:
    """Run the stage, and end with its own record."""
    job: dict[str, Any] = json.load(sys.stdin)
    deadline = time.monotonic() + job["seconds"]
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    # Where it hangs, the log shows at which line.
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


def _end_with(parent: int) -> None:
    """End this process and what it started once its parent is gone: nobody else would free the GPU."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)


def _run(job: dict[str, Any], deadline: float, write: Callable[[str], None]) -> None:
    import torch

    from .context import Context, GpuLostError

    if os.environ.get(REHEARSAL):
        from . import rehearsal

        rehearsal.prepare()
    context = Context(
        stage=job["stage"],
        device=torch.device("cpu" if job["rehearse"] else "cuda"),
        rehearse=job["rehearse"],
        deadline=deadline,
        send=lambda record: write(record.line()),
        announce=lambda case: write(json.dumps({"begun": case})),
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
        os._exit(GPU_LOST)  # what Python does at its end would wait for the GPU
    context.finish(time.monotonic() - begin)


if __name__ == "__main__":
    main()
