"""A file imports only what stands below it, and a distillation step cannot reach a data set."""

import ast
import os
import re
from pathlib import Path

import pytest

import dfkd_fast

ROOT = Path(dfkd_fast.__file__).parent
# From the ground up; what shares a floor must not know its neighbours.
FLOORS = [
    {"kernels"},
    {"errors", "labels", "choices", "interrupt"},
    {"environment", "console", "renamed"},
    {"settings", "files", "doctor", "distributed"},
    {"locks", "log", "out_of_memory"},
    {"recipe_files"},
    {"surgery"},
    {"models"},
    {"data", "methods"},
    {"engine", "evaluation"},
    {"recipe"},
    {"report"},
    {"claim"},
    {"run"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
MODULES = sorted(
    (Path(folder) / name).relative_to(ROOT)
    # not rglob: kernels is a link in a checkout
    for folder, _, names in os.walk(ROOT, followlinks=True)
    for name in names
    if name.endswith(".py") and Path(folder) / name != ROOT / "__init__.py"
)
# Of those that the stable headers of PyTorch 2.11 have. TORCH_TARGET_VERSION hides later functions, but not later macros.
MACROS = {
    "STABLE_TORCH_LIBRARY_FRAGMENT",
    "STABLE_TORCH_LIBRARY_IMPL",
    "STD_CUDA_CHECK",
    "STD_CUDA_KERNEL_LAUNCH_CHECK",
    "STD_TORCH_CHECK",
    "TORCH_ABI_VERSION",
    "TORCH_BOX",
    "TORCH_ERROR_CODE_CHECK",
}


def room(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The rooms of this package that a file imports anywhere, also inside functions."""
    rooms = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ["dfkd_fast", *path.parts[:-1]]
            base = package[: len(package) + 1 - node.level] if node.level else []
            stem = [*base, *(node.module.split(".") if node.module else [])]
            names = [".".join([*stem, alias.name]) for alias in node.names]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("dfkd_fast.")}
    return rooms


def floor_of(name: str) -> int:
    return next(level for level, rooms in enumerate(FLOORS) if name in rooms)


def test_every_module_has_a_floor() -> None:
    assert {room(path.parts) for path in MODULES} == set().union(*FLOORS)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_file_imports_only_what_stands_below_it(path: Path) -> None:
    here = room(path.parts)
    for other in imported_rooms(path) - {here, "__version__"}:
        assert floor_of(other) < floor_of(here), f"{path} imports {other}"


def test_nothing_that_trains_can_reach_a_data_set() -> None:
    for path in MODULES:
        if room(path.parts) in ("kernels", "surgery", "models", "methods", "engine"):
            text = (ROOT / path).read_text()
            assert not {"data", "evaluation"} & imported_rooms(path)
            assert not any(library in text for library in ("torchvision.datasets", "sklearn", "torch.utils.data")), path


def test_kernels_know_nothing_of_the_project() -> None:
    for path in MODULES:
        if room(path.parts) == "kernels":
            assert imported_rooms(path) <= {"kernels"}


def test_csrc_uses_only_macros_that_pytorch_2_11_has() -> None:
    used = {
        macro
        for path in (ROOT / "csrc").iterdir()
        for macro in re.findall(r"\b(?:STABLE|STD|TORCH|AOTI|C10|AT)_[A-Z0-9_]+\b", path.read_text())
    }
    assert not used - MACROS


def test_no_module_below_the_commands_names_a_flag() -> None:
    """A library's error names the field; the command line adds its flag."""
    for path in MODULES:
        if room(path.parts) in ("surgery", "models", "methods", "data", "evaluation", "engine", "recipe"):
            texts = (node.value for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.Constant))
            flags = [text for text in texts if isinstance(text, str) and re.search(r"(^|[ (`])--[a-z]", text)]
            assert not flags, f"{path}: {flags}"
