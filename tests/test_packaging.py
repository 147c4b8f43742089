"""kernels/ is dfkd_fast.kernels in an editable install, in a wheel, and in a wheel made from a source archive; csrc/ travels along."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import dfkd_fast
from dfkd_fast.kernels import build

ROOT = Path(__file__).parent.parent


def python(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that ``python -m build`` makes: through a source archive, as a release is; without the extension."""
    folder = tmp_path_factory.mktemp("dist")
    # A build writes beside its sources, where another process that runs these tests may be at the same time.
    source = folder / "source"
    shutil.copytree(
        ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "__pycache__", "results")
    )
    python("-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder, DFKD_FAST_BUILD="0")
    return next(folder.glob("*.whl"))


def test_wheel_holds_every_module_recipe_cuda_source_and_the_type_marker(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str((Path(folder) / name).relative_to(ROOT))
        for folder, _, names in os.walk(ROOT / "dfkd_fast", followlinks=True)
        for name in names
        if name.endswith((".py", ".toml", "py.typed", ".cpp", ".h", ".cu", ".cuh", ".jinja"))
    }
    assert {"dfkd_fast/kernels/ema/reference.py", "dfkd_fast/csrc/ema.cu"} <= expected
    assert expected <= held
    assert not any(name.startswith(("kernels/", "bench/", "tests/")) for name in held)


def test_wheel_works_on_its_own(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    python("-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    code = "import dfkd_fast.kernels as k, dfkd_fast; print(k.__file__); print(dfkd_fast.load_recipe('digits').name)"
    file, recipe = python("-c", code, cwd=tmp_path, PYTHONPATH=str(site)).splitlines()
    assert Path(file) == site / "dfkd_fast" / "kernels" / "__init__.py"
    assert recipe == "digits"


def test_installed_package_finds_its_kernels_from_any_folder(tmp_path: Path) -> None:
    if metadata.version("dfkd-fast") != dfkd_fast.__version__:
        pytest.fail("the installed version is not this one: pip install -e . again")
    code = "import dfkd_fast.kernels as k, pathlib; print(pathlib.Path(k.__file__).resolve())"
    assert Path(python("-c", code, cwd=tmp_path)).resolve() == (Path(dfkd_fast.__file__).parent / "kernels" / "__init__.py").resolve()


@pytest.fixture
def toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A CUDA toolkit whose nvcc the test writes."""
    if build.unbuildable_reason() not in (None, "no nvcc: install the CUDA toolkit, or set CUDA_HOME"):
        pytest.skip(f"the extension cannot be built here: {build.unbuildable_reason()}")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch(0o755)
    return nvcc


def test_a_wheel_with_the_extension_serves_every_python_on_one_platform(wheel: Path, toolkit: Path, tmp_path: Path) -> None:
    toolkit.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho binary > "$2"\n')
    built = _wheel_from_archive(wheel, tmp_path)
    assert "-py3-none-linux_" in built.name
    assert "dfkd_fast/kernels/dfkd_fast_cuda.so" in zipfile.ZipFile(built).namelist()


def test_a_compiler_that_fails_costs_the_extension_and_not_the_installation(wheel: Path, toolkit: Path, tmp_path: Path) -> None:
    toolkit.write_text('#!/bin/sh\necho "ema.cu(3): error: none such" >&2\nexit 2\n')
    built = _wheel_from_archive(wheel, tmp_path)
    assert built.name == wheel.name
    assert built.name.endswith("-py3-none-any.whl")
    assert sorted(zipfile.ZipFile(built).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())
    result = (tmp_path / "result").read_text().splitlines()
    assert [line for line in result if line.startswith("dfkd_fast: ")] == [
        "dfkd_fast: built without its CUDA extension (nvcc failed: ema.cu(3): error: none such); dfkd-fast build adds it later"
    ]


def _wheel_from_archive(wheel: Path, folder: Path) -> Path:
    """Another wheel from the archive beside this one; what was printed is in the file ``result``."""
    with tarfile.open(next(wheel.parent.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    source = next(path.parent for path in folder.glob("*/setup.py"))
    (folder / "result").write_text(python("-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source, cwd=folder))
    return next(folder.glob("*.whl"))
