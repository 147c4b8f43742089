"""Code that only a data file names is never run."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dfkd_fast.models import build_model, is_user_function, save_weights
from dfkd_fast.recipe import load_recipe, recipe_to_toml
from tests.command_line import Run

NETWORK = """
from pathlib import Path
from torch import nn

def tiny(num_classes: int) -> nn.Module:
    layers = nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(8, num_classes))

Path("proof").touch()
"""
TINY = ("loop.epochs=1", "loop.iterations_per_epoch=2", "loop.batch_size=8", "teacher.epochs=1", "data.subset=50")


@pytest.fixture
def code(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A ``module:function`` in the working folder; importing it leaves the file ``proof``."""
    module = f"planted_{tmp_path.parent.name.replace('-', '_')}_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text(NETWORK)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return f"{module}:tiny"


def ran(code: str) -> bool:
    """Whether the module was imported since the last call."""
    sys.modules.pop(code.partition(":")[0], None)
    importlib.invalidate_caches()
    proof = Path("proof")
    if there := proof.exists():
        proof.unlink()
    return there


def weights(path: Path, code: str, **changes: Any) -> None:
    """Weights as a run with this student leaves them."""
    recipe = load_recipe("digits", {"student.model": code})
    network = build_model(code, 10, 1)
    assert ran(code)
    save_weights(network, path, {"role": "student", "recipe": recipe_to_toml(recipe)} | changes)


def test_evaluate_runs_a_function_that_a_header_names_only_if_the_command_line_does(run: Run, code: str) -> None:
    weights(Path("w.safetensors"), code)
    Path("mine.toml").write_text(f'extends = "digits"\n[student]\nmodel = "{code}"\n')
    other = ["--model", code.replace("tiny", "other")], ["--recipe", "digits"]
    for options in ([], *other):
        result = run("evaluate", "w.safetensors", *options)
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert f"student.model = {code!r} in the metadata of w.safetensors: code that a file names runs only if" in result.err
        assert f"--model {code}, or --recipe FILE" in result.err
        assert not ran(code)
    for options in (["--model", code], ["--recipe", "mine.toml"], ["--set", f"student.model={code}"]):
        result = run("evaluate", "w.safetensors", *options)
        assert result.code == 0, result.err
        assert ran(code)


def test_one_model_confirms_the_code_of_several_files(run: Run, code: str) -> None:
    for name in ("a", "b"):
        weights(Path(f"{name}.safetensors"), code)
    result = run("evaluate", "a.safetensors", "b.safetensors", "--model", code, "--json", "f.json")
    assert result.code == 0, result.err
    assert len(json.loads(Path("f.json").read_text())) == 2


def test_resume_runs_a_function_that_the_folder_names_only_if_the_command_line_does(run: Run, code: str) -> None:
    changes = [word for change in TINY for word in ("--set", change)]
    named = ["--set", f"student.model={code}"]
    result = run("distill", "digits", *changes, *named, "--out", "r")
    assert result.code == 0, result.err
    assert ran(code)
    result = run("distill", "digits", *changes, "--out", "r", "--resume")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert f"student.model = {code!r} in r/recipe.toml: code that a folder names runs only if the command line names it" in result.err
    assert not ran(code)
    for recipe, options in (("digits", named), ("r/recipe.toml", [])):
        result = run("distill", recipe, *changes, *options, "--out", "r", "--resume")
        assert result.code == 0, result.err
        assert ran(code)


@pytest.mark.parametrize(
    "name", ["lenet5", "wrn40_2", "resnet18", "timm:resnet18", "torchvision:deeplabv3_resnet50", "lraspp:os", "deeplabv3:a:b"]
)
def test_library_names_are_not_code(name: str) -> None:
    assert not is_user_function(name)


@pytest.mark.parametrize("name", ["os:abort", "a.b:c", "hf-hub:timm/resnet18", "timm:hf-hub:x", "local-dir:x", "a:b:c"])
def test_every_other_name_with_a_colon_is_code(name: str) -> None:
    assert is_user_function(name)


HEADER = recipe_to_toml(load_recipe("digits"))


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"role": "assistant", "recipe": HEADER}, "role 'assistant' in the metadata of w.safetensors: must be 'teacher' or 'student'"),
        ({"recipe": HEADER}, "w.safetensors has a recipe but no role in its metadata: must be 'teacher' or 'student'; use --role"),
        ({"role": "student"}, "w.safetensors has no metadata that names its network"),
        ({"role": "student", "recipe": ""}, "recipe in w.safetensors: name is missing"),
        ({"role": "student", "recipe": "name = "}, "recipe in w.safetensors is not TOML"),
        ({"role": "student", "recipe": "a = " + 4000 * "["}, "recipe in w.safetensors is nested too deeply"),
        ({"role": "student", "recipe": 'name = "x"\nextends = "digits"'}, "unknown key 'extends'"),
        ({"role": 3}, "w.safetensors cannot be read: 'dfkd_fast' in its header must be a JSON object of strings"),
    ],
)
def test_incomplete_metadata_is_one_line(run: Run, metadata: dict[str, Any], problem: str) -> None:
    save_weights(build_model("lenet5_half", 10, 1), Path("w.safetensors"), metadata)
    result = run("evaluate", "w.safetensors")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert problem in result.err


def test_a_role_on_the_command_line_completes_the_metadata(run: Run) -> None:
    save_weights(build_model("lenet5_half", 10, 1), Path("w.safetensors"), {"recipe": HEADER})
    result = run("evaluate", "w.safetensors", "--role", "student")
    assert result.code == 0, result.err


def test_the_key_on_the_command_line_chooses_for_teachers_and_for_evaluation(run: Run) -> None:
    states = [build_model("lenet5", 10, 1).state_dict() for _ in range(2)]
    torch.save({"model": states[0], "ema": states[1]}, "w.pth")
    changes = [word for change in TINY for word in ("--set", change)]
    taken = "weights {}: loaded 'ema' (10 tensors), ignored 'model'"
    evaluated = ("evaluate", "w.pth", "--recipe", "digits", "--role", "teacher")
    distilled = ("distill", "digits", *changes, "--teacher", "w.pth", "--out", "r")
    examined = ("doctor", "--teacher", "digits", "--weights", "w.pth")
    for command in (evaluated, distilled, examined):
        result = run(*command)
        assert (result.code, result.err.count("\n")) == (2, 1), command
        assert "'model' and 'ema': choose by key= or teacher.weights_key (--weights-key)" in result.err
    result = run(*evaluated, "--weights-key", "ema")
    assert result.code == 0, result.err
    assert taken.format("w.pth") in result.out
    result = run(*distilled, "--weights-key", "ema")
    assert result.code == 0, result.err
    assert taken.format(Path("w.pth").resolve()) in result.out
    assert load_recipe("r/recipe.toml").teacher.weights_key == "ema"
    result = run(*examined, "--weights-key", "ema")
    assert "loaded 'ema'" in result.out
    result = run("evaluate", "r", "--weights-key", "ema")
    assert result.code == 2
    assert "--weights-key 'ema': weight files of a run hold one state dict only" in result.err
    result = run("distill", "digits", *changes, "--teacher", "package", "--weights-key", "ema", "--out", "r2")
    assert (result.code, "teacher.weights_key (--weights-key) = 'ema': must be empty" in result.err) == (2, True)
