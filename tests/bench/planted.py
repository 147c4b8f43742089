"""Stages with one fault each, for faults.py. Imports little, because every stage has its own process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.gpu.context import Context, GpuLostError

if TYPE_CHECKING:
    from torch import Tensor


def sound(context: Context) -> None:
    for case in context.cases(["first", "second"]):
        with context.attempt(case):
            context.record(
                case, text=f"{case} of {context.origin['commit']}", row={"value": 1.5}, table="planted", highlight=case == "second"
            )


def raising(context: Context) -> None:
    context.record("before")
    raise ZeroDivisionError("planted\nwith a second line")


def failing_case(context: Context) -> None:
    for case in ("bad", "good"):
        with context.attempt(case):
            if case == "bad":
                raise RuntimeError("planted")
            context.record(case)


def hanging(context: Context) -> None:
    """Ignores SIGTERM, with a child process that holds its pipes open and writes forever."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    context.record("before")
    child = subprocess.Popen([sys.executable, "-c", "import time\nwhile True: print('child', flush=True); time.sleep(0.05)"])
    context.record("child", text=str(child.pid))
    with context.attempt("stuck"):
        time.sleep(1000)


def leaving_a_child(context: Context) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time\nwhile True: print('child', flush=True); time.sleep(0.05)"])
    context.record("child", text=str(child.pid))


def dying(context: Context) -> None:
    for case in context.cases(["before", "deadly", "after"]):
        with context.attempt(case):
            if case == "deadly":
                os.kill(os.getpid(), signal.SIGSEGV)
            context.record(case)


def leaving_before_dying(context: Context) -> None:
    if not context.done:
        context.leave("left at first")
    for case in context.cases(["deadly", "left at first"]):
        with context.attempt(case):
            if case == "deadly":
                os.kill(os.getpid(), signal.SIGSEGV)
            context.record(case)


def dying_at_once(context: Context) -> None:
    os._exit(3)


def losing_the_gpu(context: Context) -> None:
    for case in context.cases(["before", "illegal", "after"]):
        if case == "illegal":
            context.record(case, "failed", "an illegal memory access was encountered")
            raise GpuLostError("planted")
        context.record(case)


def wrong_kernel(context: Context) -> None:
    """The smoke stage with a Triton kernel whose result is slightly wrong."""
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
    from bench.gpu import rehearsal, smoke
    from dfkd_fast.kernels.moments import gpu

    right: Callable[..., tuple[Tensor, ...]] = gpu.combine_moments

    def wrong(*arguments: Any) -> "tuple[Tensor, ...]":
        moments, offsets = right(*arguments)
        moments[1].mul_(1.001)
        return moments, offsets

    rehearsal.prepare()
    gpu.combine_moments = wrong  # type: ignore[assignment]
    for name in set(smoke.OPERATIONS) - {"channel_moments", "l1_discrepancy"}:
        del smoke.OPERATIONS[name]
    smoke.RECIPES = ()
    smoke.run(context)


def full_disk(context: Context) -> None:
    with Path("/dev/full").open("w") as file:
        file.write("something")


def without_time(context: Context) -> None:
    for case in context.cases(["short", "long"], needs=0.0 if context.done else 1000.0):
        context.record(case)


def recording_variables(context: Context) -> None:
    for name in ("DFKD_FAST_BACKEND", "PYTEST_ADDOPTS", "TRITON_INTERPRET", "GIVEN"):
        context.record(name, text=os.environ.get(name, "cleared"))
    context.record("PyTorch", text="imported" if "torch" in sys.modules else "not imported")


def flooding(context: Context) -> None:
    for number in range(1000):
        print(f"{number:0>1000}")


def few_tests(context: Context) -> None:
    """The tests stage, on the tests in a file that an environment variable names."""
    from bench.gpu import tests

    file = Path(os.environ["PLANTED_TESTS"])
    root = file if file.is_dir() else file.parent
    # Hypothesis, which the planted tests do not use, takes a second to import in each of pytest's processes.
    tests.ON_CPU = (tests.Part(("-p", "no:hypothesispytest", f"--rootdir={root}", str(file)), 1),)
    tests.run(context)
