"""Description and ``[provenance]`` of recipes that were derived from others: they may not speak of values that the recipe does not have."""

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from dfkd_fast import load_recipe
from dfkd_fast.recipe import Recipe, recipe_from_toml, recipe_to_toml
from dfkd_fast.recipe_files import shipped_recipes
from tests.command_line import Run

SHIPPED = resources.files("dfkd_fast") / "recipes"
TINY = ["--set", "loop.epochs=2", "--set", "loop.iterations_per_epoch=1", "--set", "loop.batch_size=8", "--set", "teacher.epochs=1"]


def written(folder: Path, name: str, text: str) -> Recipe:
    (folder / f"{name}.toml").write_text(text)
    return load_recipe(str(folder / f"{name}.toml"))


def stated(name: str) -> dict[str, Any]:
    return tomllib.loads((SHIPPED / f"{name}.toml").read_text())


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_states_its_own_description(name: str) -> None:
    assert load_recipe(name).description == stated(name)["description"]


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if "extends" in stated(name)])
def test_a_shipped_recipe_lists_what_differs_from_the_one_that_it_extends(name: str) -> None:
    base, listed = stated(name)["extends"], load_recipe(name).provenance
    for section, values in stated(name).items():
        for key, value in values.items() if isinstance(values, dict) and section != "provenance" else ():
            path = f"{section}.{key}"
            if isinstance(value, dict) or section == "report" or path in ("data.workers", "teacher.weights"):
                continue
            before, after = (getattr(getattr(load_recipe(one), section), key) for one in (base, name))
            assert (f"{path}: " in listed.get(f"changed from {base}", "")) == (before != after), path


def test_what_extends_a_recipe_keeps_its_entries_and_lists_the_differences(tmp_path: Path) -> None:
    mine = written(tmp_path, "mine", 'extends = "digits"\nseed = 3\n[student]\nmodel = "lenet5"\n[loop]\nepochs = 3\nbatch_size = 64\n')
    assert mine.provenance == load_recipe("digits").provenance | {
        "changed from digits": 'student.model: "lenet5_half" → "lenet5", loop.epochs: 20 → 3'
    }


def test_a_value_that_the_base_does_not_state_is_compared_with_its_default(tmp_path: Path) -> None:
    mine = written(tmp_path, "mine", 'extends = "digits"\n[replay]\nrows = 16\n[loop]\nevaluate_every = 1\n[objective]\nadversarial = 1\n')
    assert mine.provenance["changed from digits"] == "replay.rows: 0 → 16"


def test_each_recipe_of_a_chain_lists_its_own_differences(tmp_path: Path) -> None:
    written(tmp_path, "first", 'extends = "digits"\n[loop]\nepochs = 3\n')
    second = written(tmp_path, "second", 'extends = "first.toml"\n[loop]\nepochs = 5\n')
    assert second.provenance["changed from digits"] == "loop.epochs: 20 → 3"
    assert second.provenance["changed from first"] == "loop.epochs: 3 → 5"
    assert second.description == "first with loop.epochs = 5"


def test_an_override_is_listed_as_a_difference_of_a_file_is(tmp_path: Path) -> None:
    mine = written(tmp_path, "mine", 'extends = "digits"\n[loop]\nepochs = 3\n')
    assert load_recipe("digits", {"loop.epochs": 3, "name": "mine"}) == mine


@pytest.mark.parametrize(
    "unlisted",
    [{}, {"name": "mine"}, {"seed": 5}, {"data.root": "d"}, {"teacher.weights": "w"}, {"report.samples": 4}, {"loop.epochs": 20}],
)
def test_what_does_not_change_the_method_changes_neither_description_nor_provenance(unlisted: dict[str, Any]) -> None:
    changed, base = load_recipe("digits", unlisted), load_recipe("digits")
    assert (changed.description, changed.provenance) == (base.description, base.provenance)


@pytest.mark.parametrize(
    ("overrides", "description"),
    [
        ({"loop.epochs": 3}, "digits with loop.epochs = 3"),
        ({"loop.epochs": 3, "description": "mine"}, "mine"),
        ({"student.model": "m" * 60}, f'digits with student.model = "{"m" * 39}…'),
        (
            {"loop.epochs": 3, "loop.batch_size": 8, "objective.one_hot": 1.0, "objective.entropy": 2.0},
            "digits with loop.epochs = 3, loop.batch_size = 8, objective.one_hot = 1.0 and 1 more change",
        ),
    ],
)
def test_a_description_names_the_first_differences(overrides: dict[str, Any], description: str) -> None:
    assert load_recipe("digits", overrides).description == description


def test_another_engine_is_listed_but_keeps_the_description() -> None:
    changed, base = load_recipe("digits", {"engine.precision": "fp32"}), load_recipe("digits")
    assert changed.description == base.description
    assert changed.provenance["changed from digits"] == 'engine.precision: "auto" → "fp32"'


def test_a_section_that_is_replaced_lists_what_returns_to_its_default() -> None:
    listed = load_recipe("digits", {"loop": {"epochs": 3, "batch_size": 64, "student_steps": 5}}).provenance["changed from digits"]
    assert listed.startswith("loop.epochs: 20 → 3, loop.iterations_per_epoch: 15 → ")


@pytest.mark.parametrize("overrides", [{}, {"loop.epochs": 3, "student.model": 'a"\\b'}])
def test_reloading_a_complete_recipe_gives_an_equal_one(tmp_path: Path, overrides: dict[str, Any]) -> None:
    recipe = load_recipe("digits-retain", overrides)
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_to_toml(recipe))
    assert recipe_from_toml(path.read_text(), "it") == load_recipe(str(path)) == load_recipe(str(path), overrides) == recipe


def test_a_second_change_of_a_complete_recipe_is_added_to_the_first(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_to_toml(load_recipe("digits", {"loop.epochs": 3})))
    again = load_recipe(str(path), {"loop.epochs": 5})
    assert again.provenance["changed from digits"] == "loop.epochs: 20 → 3, loop.epochs: 3 → 5"
    assert again.description == "a changed digits with loop.epochs = 5"


def test_a_run_carries_what_was_changed_and_resumes_with_other_texts_and_paths(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run("distill", "digits", "--out", folder, *TINY).code == 0
    text = (folder / "recipe.toml").read_text()
    recipe = recipe_from_toml(text, "recipe.toml")
    assert recipe.provenance["changed from digits"].startswith("teacher.epochs: 40 → 1, loop.epochs: 20 → 2, ")
    assert "changed from digits" in (folder / "report.html").read_text()
    options = ["--set", "engine.precision=auto", "--set", "report.samples=4"]
    assert run("distill", "digits", "--out", folder, "--resume", *TINY, *options).code == 0
    resumed = recipe_from_toml((folder / "recipe.toml").read_text(), "recipe.toml")
    assert (resumed.description, resumed.provenance, resumed.report.samples) == (recipe.description, recipe.provenance, 4)
    (folder / "recipe.toml").write_text(text.replace("changed from digits", "changed").replace("MAD (arXiv", "the paper (arXiv"))
    (folder / "teacher.safetensors").unlink()
    result = run("distill", "digits", "--out", folder, "--resume", *TINY)
    assert result.code == 0, result.err
