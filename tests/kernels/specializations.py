"""Count the specializations that the GPU tests of the Triton kernels would compile, without a GPU.

Triton compiles a kernel for every combination of argument dtypes, constants, and integers that are 1 or multiples of 16. Each
such specialization takes some tenths of a second at the first step that needs it. From the root of the repository:

    python -m tests.kernels.specializations count FILE         # count by kernel and write to FILE
    python -m tests.kernels.specializations time FILE --of 40  # compile 40 of them for compute capability 9.0

The first command runs all test cases that can run on a CPU, with this file as a pytest plugin: launches are recorded under
Triton's cache key, and numba computes the results. Tests of CUDA graphs and of the engine need a GPU and are not counted.
"""

import argparse
import pickle
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

from tests.kernels.on_cpu import SHARED, run_on_cpu, run_pytest

TARGET = GPUTarget("cuda", 90, 32)
OPERATIONS = ("bias_act", "concat", "discrepancy", "ema", "moments", "norm")


class Specialization(NamedTuple):
    """A specialization of a kernel, in the form of the arguments of ``ASTSource`` and ``triton.compile``."""

    module: str
    kernel: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    def compile(self) -> Any:
        """Compile for ``TARGET``; not in interpreter mode."""
        source = ASTSource(getattr(import_module(self.module), self.kernel), self.signature, self.constants, self.attributes)
        return triton.compile(source, target=TARGET, options=self.options)


class Recorder:
    """Records the distinct specializations of all launches."""

    def __init__(self) -> None:
        self.specializations: dict[tuple[str, str, str], Specialization] = {}
        """By module, kernel and Triton's cache key."""
        self._backend = make_backend(TARGET)
        self._kernels: dict[Any, tuple[Any, Callable[..., Any]]] = {}

    def launch(self, kernel: Any, *arguments: Any, **options: Any) -> None:
        """Record a launch instead of executing it."""
        for passed_by_the_caller in ("grid", "warmup"):
            options.pop(passed_by_the_caller)
        if kernel.fn not in self._kernels:
            function = JITFunction(kernel.fn, **kernel.kwargs) if isinstance(kernel, InterpretedFunction) else kernel
            self._kernels[kernel.fn] = function, create_function_from_signature(function.signature, function.params, self._backend)
        function, bind = self._kernels[kernel.fn]
        bound, specialization, rest = bind(*arguments, **options)
        key = kernel.fn.__module__, kernel.fn.__name__, compute_cache_key({}, specialization, rest)
        if key not in self.specializations:
            parsed, signature, constants, attributes = function._pack_args(self._backend, options, bound, specialization, rest)
            self.specializations[key] = Specialization(*key[:2], signature, constants, attributes, parsed.__dict__)


def by_kernel(specializations: Sequence[Specialization]) -> Counter[str]:
    """Return the number of specializations per kernel, under names like "ema._update_kernel"."""
    return Counter(f"{one.module.split('.')[-2]}.{one.kernel}" for one in specializations)


def collect(*, sample: bool) -> list[Specialization]:
    """Return the specializations of the tests of all backends and of Triton, or of a fixed sample of the former.

    Raises:
        AssertionError: a test failed or was skipped.
    """
    specializations_by_key: dict[tuple[str, str, str], Specialization] = {}
    environment = {"TRITON_INTERPRET": "1"}
    with TemporaryDirectory() as folder:
        path = Path(folder, "specializations")
        options = "-p", "tests.kernels.specializations", f"--specializations={path}"
        for files in SHARED.values():
            run_on_cpu("triton", files, environment, *options, sample=sample)
            specializations_by_key |= pickle.loads(path.read_bytes())
        if not sample:
            run_pytest(["test_triton.py"], environment, *options)
            specializations_by_key |= pickle.loads(path.read_bytes())
    return list(specializations_by_key.values())


# ------------------------------------------------------------------------------------------------ the plugin


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--specializations", type=Path, help="output file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDER] = Recorder()


def pytest_collection_finish(session: pytest.Session) -> None:
    recorder = session.config.stash[RECORDER]
    InterpretedFunction.run = lambda kernel, *arguments, **options: recorder.launch(kernel, *arguments, **options)
    for operation in OPERATIONS:
        of_triton, of_numba = (import_module(f"dfkd_fast.kernels.{operation}.{module}") for module in ("gpu", "cpu"))
        for name in vars(of_triton).keys() & import_module("dfkd_fast.kernels.operators").SCHEMAS.keys():
            setattr(of_triton, name, _computed_by(getattr(of_numba, name), getattr(of_triton, name)))


def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.getoption("specializations").write_bytes(pickle.dumps(session.config.stash[RECORDER].specializations))


RECORDER = pytest.StashKey[Recorder]()


def _computed_by(compute: Callable[..., Any], launch: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        launch(*arguments)
        return compute(*arguments)

    return call


# ------------------------------------------------------------------------------------------------ the command


def _count(arguments: argparse.Namespace) -> None:
    specializations = collect(sample=False)
    arguments.file.write_bytes(pickle.dumps(specializations))
    for kernel, count in by_kernel(specializations).most_common():
        print(f"{count:5}  {kernel}")
    print(f"{len(specializations):5}  in all")


def _time(arguments: argparse.Namespace) -> None:
    specializations: list[Specialization] = pickle.loads(arguments.file.read_bytes())
    chosen = random.Random(0).sample(specializations, min(arguments.of, len(specializations)))
    with TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        chosen[0].compile()  # excludes one-time costs
        start = time.process_time(), time.perf_counter()
        for specialization in chosen[1:]:
            specialization.compile()
        core, wall = (
            (now - before) / (len(chosen) - 1) for now, before in zip((time.process_time(), time.perf_counter()), start, strict=True)
        )
    print(f"{len(chosen) - 1} of {len(specializations)}: {wall:.2f} s each, of which {core:.2f} s in this process")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Count what the GPU tests of the Triton kernels would compile.")
    commands = parser.add_subparsers(required=True)
    for name, function in (("count", _count), ("time", _time)):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("file", type=Path)
    command.add_argument("--of", type=int, default=40, help="number of specializations to compile")
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
