"""Keys of earlier versions."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from dfkd_fast import DfkdError, load_recipe
from dfkd_fast.renamed import FORMER_WEIGHTS_REPLACED, RENAMED, RenamedKeyWarning, current_keys
from tests.command_line import Run

OF_0_1_0 = [f"{old} is now called {new}" for old, new in RENAMED.items() if not old.startswith("engine.")] + [FORMER_WEIGHTS_REPLACED]
"""Warnings about the keys of a recipe of 0.1.0."""
RUN = Path(__file__).parent / "artefacts" / "0.1.0" / "mad" / "finished" / "recipe.toml"


def value_at(content: Any, path: str) -> Any:
    for name in path.split("."):
        content = content[name] if isinstance(content, dict) else getattr(content, name)
    return content


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_key_is_read_as_the_new_one_with_a_warning(old: str, new: str) -> None:
    section, key = old.split(".")
    with pytest.warns(RenamedKeyWarning) as caught:
        current = current_keys({section: {key: 7, "other": 1}}, "it")
    assert [str(warning.message) for warning in caught] == [f"{old} is now called {new}"]
    assert value_at(current, new) == 7
    assert current[section]["other"] == 1
    assert key not in current[section]


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_key_under_both_names_is_refused(old: str, new: str) -> None:
    content: dict[str, Any] = {}
    for path in (old, new):
        *sections, key = path.split(".")
        table = content
        for name in sections:
            table = table.setdefault(name, {})
        table[key] = 7
    with pytest.raises(DfkdError, match=rf"it: {old} is now called {new}, and both are given"):
        current_keys(content, "it")


def test_the_input_is_not_modified() -> None:
    content = {"loop": {"epochs": 3, "capture": False}, "name": "a"}
    with pytest.warns(RenamedKeyWarning):
        assert current_keys(content, "it") == {"loop": {"epochs": 3}, "engine": {"capture": False}, "name": "a"}
    assert content == {"loop": {"epochs": 3, "capture": False}, "name": "a"}


@pytest.mark.parametrize("content", [{"loop": 3}, {"loop": {"capture": False}, "engine": 5}])
def test_a_section_that_is_not_a_table_is_left_to_validation(content: dict[str, Any]) -> None:
    assert current_keys(content, "it") == content


def test_a_renamed_key_is_warned_about_once_however_often_the_recipe_is_read() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", RenamedKeyWarning)
        for _ in range(3):
            load_recipe(str(RUN), {"loop.precision": "fp32"})
    texts = [str(warning.message) for warning in caught]
    assert sorted(texts) == sorted(OF_0_1_0)


@pytest.mark.filterwarnings("ignore::dfkd_fast.renamed.RenamedKeyWarning")
def test_an_override_that_replaces_a_section_may_use_old_keys() -> None:
    recipe = load_recipe("digits", {"loop": {"precision": "bf16", "epochs": 3}, "replay": {"kind": "ema_generator", "ema_decay": 0.3}})
    assert (recipe.engine.precision, recipe.loop.epochs, recipe.loop.batch_size) == ("bf16", 3, 256)  # the section's own default
    assert value_at(recipe, "replay.ema_generator.decay") == 0.3


def test_a_command_warns_about_a_renamed_key_once_however_many_files_hold_it(run: Run, tmp_path: Path) -> None:
    old, folder = RUN.parent.parent, tmp_path / "run"
    shutil.copytree(old / "interrupted", folder)
    result = run("distill", str(old / "tiny-mad.toml"), "--out", str(folder), "--resume", "--device", "cpu")
    assert result.code == 0
    assert sorted(result.err.splitlines()) == sorted(f"dfkd-fast: {line}" for line in OF_0_1_0)
