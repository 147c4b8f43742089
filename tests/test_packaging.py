"""kernels/ is dfkd_fast.kernels in an editable install, in a wheel, and in a wheel made from a source archive."""

import os
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import dfkd_fast

ROOT = Path(__file__).parent.parent


def python(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that ``python -m build`` makes: through a source archive, as a release is."""
    folder = tmp_path_factory.mktemp("dist")
    python("-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return next(folder.glob("*.whl"))


def test_wheel_holds_every_module_recipe_and_the_type_marker(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        str((Path(folder) / name).relative_to(ROOT))
        for folder, _, names in os.walk(ROOT / "dfkd_fast", followlinks=True)
        for name in names
        if name.endswith((".py", ".toml", "py.typed"))
    }
    assert "dfkd_fast/kernels/ema/reference.py" in wanted
    assert wanted <= held
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
