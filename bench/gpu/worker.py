"""The process of one stage: ``python -m bench.gpu.worker``, which ``schedule.py`` starts. Records go to a pipe, line by line."""

import faulthandler
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from .records import Record

__all__ = ["main"]


def main() -> None:
    """Run the stage that the first argument describes, in JSON: see ``schedule.py``."""
    job: dict[str, Any] = json.loads(sys.argv[1])
    os.set_inheritable(job["pipe"], False)  # what the stage starts must not keep the pipe open
    deadline = time.monotonic() + job["seconds"]
    # Where it hangs, the log shows at which line, shortly before the process is killed.
    faulthandler.dump_traceback_later(max(0.5, job["seconds"] - 0.5))
    with os.fdopen(job["pipe"], "w", buffering=1) as pipe:

        def send(record: Record) -> None:
            pipe.write(record.line() + "\n")

        try:
            _run(job, deadline, send)
        except BaseException as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            send(Record(job["stage"], "", "failed", text, traceback.format_exc()[-4000:]))
            raise


def _run(job: dict[str, Any], deadline: float, send: Any) -> None:
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
        send=send,
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
