"""Compile the CUDA extension from ``csrc`` by calling nvcc directly, without ninja.

The shared library uses PyTorch's stable ABI only and no Python headers, so that one binary works with every PyTorch from 2.11
on and with every Python version. Used by setup.py and ``dfkd-fast build``; this file imports nothing of the project, so that
setup.py can load it on its own.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

__all__ = ["BuildError", "compile_extension", "unbuildable_reason"]

SOURCES = Path(__file__).parent.parent / "csrc"  # next to kernels/ in the repository and in an installed package
VARIABLE = "DFKD_FAST_BUILD"
STABLE_INTERFACE = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # PyTorch 2.11's
ARCHITECTURES = ("-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]")
FLAGS = (
    "-std=c++20",
    "-O2",
    "-Werror=all-warnings",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
    "-DUSE_CUDA",
    STABLE_INTERFACE,
)


class BuildError(RuntimeError):
    """The extension could not be compiled. The first line of the message is the cause; the compiler's output follows."""


def unbuildable_reason() -> str | None:
    """Return why the extension cannot be compiled here, in one line, or None if it can. No GPU is needed."""
    if os.environ.get(VARIABLE) == "0":
        return f"{VARIABLE} is 0"
    if sys.platform != "linux":
        return "built on Linux only"
    if find_spec("torch") is None:
        return "PyTorch cannot be imported"
    import torch

    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    if not SOURCES.is_dir():
        return f"no sources in {SOURCES}"
    if _nvcc() is None:
        return "no nvcc: install the CUDA toolkit, or set CUDA_HOME"
    return None


def compile_extension(
    binary: Path, verbose: bool = False, *, sources: Path = SOURCES, architectures: Sequence[str] = ARCHITECTURES
) -> None:
    """Compile and link the extension; an existing ``binary`` is replaced only on success.

    Args:
        binary: path of the shared library to write.
        verbose: print the commands and the compiler's output.
        sources: directory of the .cpp and .cu files.
        architectures: nvcc's ``-gencode`` options.

    Raises:
        BuildError: the extension cannot be built here, or the compiler failed.
    """
    if (reason := unbuildable_reason()) is not None:
        raise BuildError(reason)
    import torch

    nvcc, package = str(_nvcc()), Path(torch.__file__).parent
    files = [path for path in sources.iterdir() if path.suffix in (".cpp", ".cu")]
    files.sort(key=lambda path: path.stat().st_size, reverse=True)  # largest files first, for load balancing
    with tempfile.TemporaryDirectory(prefix="dfkd_fast-") as folder:
        objects = [Path(folder) / f"{source.name}.o" for source in files]
        compiles = [
            [nvcc, *FLAGS, *architectures, "-isystem", package / "include", "-c", source, "-o", target]
            for source, target in zip(files, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda command: _run(command, verbose), compiles))
        linked = Path(folder) / binary.name
        # Without --no-as-needed the linker would drop torch_cuda, whose symbols are resolved at load time. The CUDA runtime is
        # linked statically; --exclude-libs keeps its symbols from clashing with PyTorch's.
        linker_options = ("-Xlinker=--no-as-needed", "-Xlinker=--exclude-libs=ALL")
        libraries = ("-L", package / "lib", "-ltorch", "-ltorch_cpu", "-ltorch_cuda")
        _run([nvcc, "-shared", *architectures, *objects, *linker_options, *libraries, "-o", linked], verbose)
        _replace(binary, linked)


def _nvcc() -> str | None:
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    for candidate in (*candidates, shutil.which("nvcc"), Path("/usr/local/cuda/bin/nvcc")):
        if candidate and Path(candidate).is_file():
            return str(candidate)
    return None


def _run(command: Sequence[str | Path], verbose: bool) -> None:
    words = [str(word) for word in command]
    if verbose:
        print(*words, flush=True)
    try:
        completed = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise BuildError(f"{words[0]} cannot be run: {error.strerror}") from error
    output = (completed.stdout + completed.stderr).strip()
    if verbose and output:
        print(output, flush=True)
    if completed.returncode != 0:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        cause = next((line for line in lines if "error" in line.lower()), lines[0] if lines else f"exit code {completed.returncode}")
        raise BuildError("\n".join([f"{Path(words[0]).name} failed: {cause}", *lines]))


def _replace(binary: Path, built: Path) -> None:
    """Replace the file atomically: a process that has loaded the old one keeps it."""
    binary.parent.mkdir(parents=True, exist_ok=True)
    part = binary.with_name(f"{binary.name}.{os.getpid()}.part")
    try:
        shutil.copy2(built, part)
        part.replace(binary)
    finally:
        part.unlink(missing_ok=True)
