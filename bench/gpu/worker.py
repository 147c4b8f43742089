"""The process of one stage: ``python -m bench.gpu.worker``, which ``schedule.py`` starts. Records go to a pipe, line by line."""

import faulthandler
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .records import Record

__all__ = ["RESTART", "main"]

RESTART = 75
"""Exit code of a stage that cannot go on in this process, but in a new one."""


def main() -> None:
    """Run the stage that the first argument describes, in JSON: see ``schedule.py``."""
    job: dict[str, Any] = json.loads(sys.argv[1])
    os.set_inheritable(job["pipe"], False)  # what the stage starts must not keep the pipe open
    deadline = time.monotonic() + job["seconds"]
    # Where it hangs, the log shows at which line, shortly before the process is killed.
    faulthandler.dump_traceback_later(max(0.5, job["seconds"] - 0.5))
    with os.fdopen(job["pipe"], "w", buffering=1) as pipe:

        def write(line: str) -> None:
            pipe.write(line + "\n")

        try:
            _run(job, deadline, write)
        except BaseException as error:
            if type(error).__name__ == "GpuLostError":
                print(f"the GPU is lost to this process: {error}", file=sys.stderr)
                os._exit(RESTART)
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            write(Record(job["stage"], "", "failed", text, traceback.format_exc()[-4000:]).line())
            raise


def _run(job: dict[str, Any], deadline: float, write: Callable[[str], None]) -> None:
    if job["rehearse"]:
        from . import rehearsal

        rehearsal.prepare()
    import torch

    from .context import Context

    context = Context(
        stage=job["stage"],
        device=torch.device("cpu" if job["rehearse"] else "cuda"),
        rehearse=job["rehearse"],
        deadline=deadline,
        send=lambda record: write(record.line()),
        announce=lambda case: write(json.dumps({"begun": case})),
        done=frozenset(job["done"]),
        data_root=Path(job["data_root"]) if job["data_root"] else None,
        commit=job["commit"],
        command=job["command"],
    )
    module, _, function = job["function"].partition(":")
    begin = time.monotonic()
    getattr(importlib.import_module(module), function)(context)
    text = f"{len(context.left)} cases are left for the next call" if context.left else ""
    seconds = round(time.monotonic() - begin, 2)
    context.record("", "left" if context.left else "ok", text, seconds=seconds, row={"complete": not context.left})


if __name__ == "__main__":
    main()
