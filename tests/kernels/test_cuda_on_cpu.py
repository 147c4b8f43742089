"""The CUDA kernels compiled for a CPU: they pass their tests, and typical faults are detected."""

import os
import re
import subprocess
import sys

import pytest

from tests.kernels.cuda_on_cpu import build
from tests.kernels.on_cpu import SHARED, run_on_cpu

ORDERS = ["forward", "reverse", "random"]
REASON = build.unavailable_reason()

pytestmark = pytest.mark.skipif(REASON is not None, reason=f"kernels cannot be compiled for a CPU here: {REASON}")


@pytest.mark.parametrize("files", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sanitized", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_kernels_pass_their_tests_in_any_thread_order(sanitized: bool, order: str, files: tuple[str, ...], exhaustive: bool) -> None:
    library = build.compile_kernels(sanitized=sanitized)
    environment = {"DFKD_FAST_EXTENSION": str(library), **build.environment(order, sanitized=sanitized)}
    run_on_cpu("cuda", files, environment, sample=order != "random" and not exhaustive)


def run_planted(fault: str, order: str = "forward", *, sanitized: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the kernel of planted.cu, which prints its output."""
    library = build.compile_library([build.HERE / "planted.cu"], sanitized=sanitized)
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).run(sys.argv[2].encode())"
    variables = os.environ | build.environment(order, sanitized=sanitized)
    command = [sys.executable, "-c", code, str(library), fault]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def written(fault: str, order: str, *, sanitized: bool = False) -> list[str]:
    run = run_planted(fault, order, sanitized=sanitized)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


RIGHT = [str(number) for number in (*range(63, -1, -1), *range(127, 63, -1))]


@pytest.mark.parametrize("sanitized", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_a_correct_kernel_is_correct_in_every_thread_order(order: str, sanitized: bool) -> None:
    assert written("none", order, sanitized=sanitized) == RIGHT


@pytest.mark.parametrize("fault", ["no barrier before reading", "no barrier before writing"])
def test_a_missing_barrier_is_detected_in_every_thread_order(fault: str) -> None:
    results = [written(fault, order) for order in ORDERS]
    assert all(result != RIGHT for result in results)
    assert results[0] != results[1]


def test_an_asynchronous_copy_is_made_only_when_it_is_waited_for() -> None:
    assert all("nan" in number for number in written("no wait for a copy", "forward"))


def test_shared_memory_is_poisoned_between_blocks() -> None:
    numbers = written("memory of another block", "forward")
    assert numbers[:64] == RIGHT[:64]
    assert all("nan" in number for number in numbers[64:])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("barrier of some", r"deadlock, 32 threads wait at planted\.cu:\d+, 32 threads wait at planted\.cu:\d+"),
        ("misaligned load", "misaligned address"),
        ("misaligned store", "misaligned store"),
        ("out of bounds in shared memory", "out of bounds for type 'float \\[64\\]'"),
    ],
)
def test_a_fault_aborts_the_process_with_a_message(fault: str, message: str) -> None:
    run = run_planted(fault)
    assert run.returncode != 0
    assert re.search(message, run.stderr)


def test_an_out_of_bounds_access_is_detected_by_the_address_sanitizer() -> None:
    run = run_planted("out of bounds", sanitized=True)
    assert run.returncode != 0
    assert "heap-buffer-overflow" in run.stderr
