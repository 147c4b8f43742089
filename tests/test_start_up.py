"""What a start imports: commands that need no network start at once, and one kernel costs PyTorch and nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest

import dfkd_fast

HEAVY = {
    "matplotlib",
    "numba",
    "scipy",
    "sklearn",
    "tensorboard",
    "timm",
    "torch",
    "torch._dynamo",
    "torchmetrics",
    "torchvision",
    "triton",
}
"""Packages that take a tenth of a second or more to import."""
COMMAND = (
    "import sys\nsys.argv = ['dfkd-fast', *{arguments}]\nfrom dfkd_fast.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
)


def imported(code: str, folder: Path) -> set[str]:
    """Names of the modules that a process has imported once it has run some code."""
    report = "\nimport sys\nprint('\\n', *sys.modules, file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code + report], cwd=folder, capture_output=True, text=True, check=True)
    return set(result.stderr.split())


@pytest.mark.parametrize(
    ("code", "needed"),
    [
        pytest.param("import dfkd_fast", set(), id="the package"),
        pytest.param("import dfkd_fast; dfkd_fast.DfkdError", set(), id="its errors"),
        *(
            pytest.param(COMMAND.format(arguments=arguments), needed, id=" ".join(arguments))
            for arguments, needed in [
                (["--help"], set()),
                (["distill", "--help"], set()),
                (["evaluate", "--help"], set()),
                (["recipes"], set()),
                (["show", "camvid-cpu"], {"torch"}),
            ]
        ),
        pytest.param("from dfkd_fast.kernels import kl_discrepancy", {"torch"}, id="a kernel"),
        pytest.param("import dfkd_fast; dfkd_fast.kernels.kl_discrepancy", {"torch"}, id="a kernel of the package"),
        pytest.param("from dfkd_fast import Trainer", {"torch"}, id="the trainer"),
    ],
)
def test_a_start_imports_of_the_heavy_packages_what_it_needs(code: str, needed: set[str], tmp_path: Path) -> None:
    assert imported(code, tmp_path) & HEAVY == needed


def test_a_kernel_imports_none_of_the_command_lines_packages(tmp_path: Path) -> None:
    assert imported("from dfkd_fast.kernels import kl_discrepancy", tmp_path).isdisjoint({"pydantic", "typer", "rich", "safetensors"})


def test_every_public_name_is_there_and_no_other() -> None:
    for name in dfkd_fast.__all__:
        assert getattr(dfkd_fast, name) is not None
    assert set(dfkd_fast.__all__) <= set(dir(dfkd_fast))
    with pytest.raises(AttributeError, match="module 'dfkd_fast' has no attribute 'Trainr'"):
        _ = dfkd_fast.Trainr
