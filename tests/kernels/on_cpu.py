"""Run the tests of a GPU backend on CPU tensors, in a separate process, because imports determine what a backend supports.

``run_on_cpu`` starts the process, in which this file is a pytest plugin that selects the tests.
"""

import os
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import pytest

HERE = Path(__file__).parent
SKIPPED = ("gpu", "parallel")  # markers
# Tests shared by all backends, split into two processes of similar duration.
SHARED = {
    "logits and averages": (
        *("test_discrepancy.py", "test_discrepancy_arguments.py", "test_discrepancy_limits.py"),
        *("test_ema.py", "test_ema_arguments.py", "test_fused_ema.py", "test_fused_ema_changes.py"),
    ),
    "images": (
        *("test_bias_act.py", "test_bias_act_arguments.py"),
        *("test_concat.py", "test_concat_arguments.py", "test_moments.py", "test_moments_arguments.py"),
        *("test_norm.py", "test_norm_arguments.py"),
        *("test_offsets.py", "test_operators.py"),
    ),
}


def run_pytest(files: Sequence[str], environment: Mapping[str, str], *options: str) -> None:
    """Run all tests in files of this directory.

    Raises:
        AssertionError: a test failed or was skipped.
    """
    options = ("-q", "-p", "no:cacheprovider", "--capture=sys", *options)  # shows the output of a process that crashes
    command = [sys.executable, "-m", "pytest", *options, *(str(HERE / file) for file in files)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    run = subprocess.run(command, cwd=HERE.parents[1], env=variables, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " skipped" not in run.stdout, run.stdout


def run_on_cpu(
    backend: Literal["triton", "cuda"], files: Sequence[str], environment: Mapping[str, str], *options: str, sample: bool = False
) -> None:
    """Run the backend's test cases in files of this directory, all or a fixed sample.

    Raises:
        AssertionError: a test failed or was skipped.
    """
    run_pytest(files, environment, "-p", "tests.kernels.on_cpu", f"--on-cpu={backend}", *(["--sample"] if sample else []), *options)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--on-cpu", help="backend whose test cases run")
    parser.addoption("--sample", action="store_true", help="run a sample of them")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    from hypothesis import Phase, settings

    from dfkd_fast.kernels import dispatch
    from tests.kernels import oracles

    options = early_config.known_args_namespace
    if options.on_cpu == "cuda":
        dispatch.BACKENDS_BY_DEVICE["cpu"].append("cuda")
    if options.sample:
        oracles.PROPERTY = settings(oracles.PROPERTY, max_examples=10, phases=[Phase.generate])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    backend = config.getoption("on_cpu")
    cases = [item for item in items if backend in _parameters(item).values() and not any(map(item.get_closest_marker, SKIPPED))]
    chosen = _sample(cases) if config.getoption("sample") else cases
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def _parameters(item: pytest.Item) -> Mapping[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def _sample(cases: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Return test cases of each function that cover every value of every parameter."""
    covered: set[tuple[str, str, str]] = set()
    sample = []
    for case in sorted(cases, key=lambda case: zlib.crc32(case.nodeid.encode())):  # a fixed pseudo-random order
        function = case.nodeid.partition("[")[0]
        values = {(function, name, str(value)) for name, value in _parameters(case).items()}
        if not values <= covered:
            covered |= values
            sample.append(case)
    return sample
