"""Compile CUDA kernels with g++ for a device emulated on the CPU (see device.h)."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
TORCH = Path(torch.__file__).parent
COMPILER = "g++"
FLAGS = (
    *("-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-include", str(HERE / "device.h")),
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    *("-Wno-unknown-pragmas", "-Wno-attributes"),  # nvcc's
    "-U_FORTIFY_SOURCE",  # its longjmp check rejects switching between stacks
    "-ftrivial-auto-var-init=pattern",  # uninitialized variables are not 0 by chance
)
ALWAYS = ("-fsanitize=alignment,bounds", "-fno-sanitize-recover=all")
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def unavailable_reason() -> str | None:
    """Return why kernels cannot be compiled here, in one line, or None."""
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    if shutil.which(COMPILER) is None:
        return f"no {COMPILER}"
    if int(_output("-dumpversion").split(".")[0]) < 12:
        return f"{COMPILER} is older than 12"
    if _toolkit() is None:
        return "no CUDA toolkit headers: set CUDA_HOME"
    return None


def compile_kernels(*, sanitized: bool = False) -> Path:
    """Compile the operators of csrc into a library that replaces the extension."""
    return compile_library([*CSRC.glob("*.cu"), HERE / "cpu_library.cpp"], sanitized=sanitized)


def compile_library(sources: Iterable[Path], *, sanitized: bool = False) -> Path:
    """Compile sources and device into a library; cached until a file changes, safe for concurrent processes."""
    sources, flags = [*sources, HERE / "device.cpp"], (*FLAGS, *(SANITIZED if sanitized else ALWAYS))
    digest = hashlib.sha256(repr((sources, flags, TORCH, torch.__version__, _toolkit(), _output("--version"))).encode())
    for path in sorted([*CSRC.iterdir(), *HERE.iterdir()]):
        if path.is_file():
            digest.update(path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dfkd_fast" / "cuda-on-cpu"
    cache.mkdir(parents=True, exist_ok=True)
    library = cache / f"{digest.hexdigest()[:16]}.so"
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                _link(sources, flags, Path(folder)).rename(library)
    return library


def environment(order: str = "forward", *, sanitized: bool = False) -> dict[str, str]:
    """Return the environment variables for running a library with the given thread order."""
    if not sanitized:
        return {"DFKD_FAST_THREAD_ORDER": order}
    # The sanitizer must be preloaded before libstdc++. Leaks of the Python interpreter are ignored.
    preloaded = " ".join(_output(f"-print-file-name={name}") for name in ("libasan.so", "libstdc++.so"))
    return {"DFKD_FAST_THREAD_ORDER": order, "LD_PRELOAD": preloaded, "ASAN_OPTIONS": "detect_leaks=0"}


def _link(sources: Iterable[Path], flags: Iterable[str], folder: Path) -> Path:
    # Quoted includes search the directory of the file first; without csrc's launch.cuh they find the one here.
    shutil.copytree(CSRC, folder / "csrc", ignore=shutil.ignore_patterns("launch.cuh"))
    includes = ("-I", folder / "csrc", "-I", HERE, "-isystem", TORCH / "include", "-isystem", _toolkit())
    commands = []
    for source in sorted(sources, key=lambda path: -path.stat().st_size):  # largest files first, for load balancing
        copy = folder / "csrc" / source.name if source.parent == CSRC else source
        commands.append([*flags, *includes, "-x", "c++", "-c", copy, "-o", folder / f"{source.name}.o"])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: _output(*command), commands))
    library = folder / "library.so"
    _output("-shared", *flags, *folder.glob("*.o"), "-L", TORCH / "lib", "-Wl,--as-needed", "-ltorch_cpu", "-o", library)
    return library


def _toolkit() -> Path | None:
    nvcc = shutil.which("nvcc")
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda")
    candidates = (Path(home) / "include" for home in homes if home)
    return next((path for path in candidates if (path / "cuda_fp16.h").is_file()), None)


def _output(*arguments: str | Path) -> str:
    run = subprocess.run([COMPILER, *arguments], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"{COMPILER} failed: {run.stderr}")
    return run.stdout.strip()
