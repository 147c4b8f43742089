"""``replay.fresh_weight`` and ``replay.weight`` of earlier versions, which ``replay.share`` and ``objective.student_weight`` replaced."""

import copy
import dataclasses
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from dfkd_fast import DfkdError, Method, Objective, Replay, Trainer, Update, load_recipe
from dfkd_fast.engine.steps import student_step
from dfkd_fast.recipe import Recipe, recipe_to_toml
from dfkd_fast.renamed import FORMER_WEIGHTS_REPLACED, RenamedKeyWarning, current_weights
from tests.small import small_method

MakeTrainer = Callable[..., Trainer]
pytestmark = pytest.mark.filterwarnings("ignore::dfkd_fast.renamed.RenamedKeyWarning")


def written(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return str(path)


def weights_of(method: Method) -> tuple[float, float]:
    """Returns the weights of the discrepancy over fresh and over replayed samples."""
    factor, share = method.objective.student_weight, method.replay.share
    return (factor * (1 - share), factor * share) if method.replay.replays else (factor, 0.0)


@pytest.mark.parametrize(("fresh", "replayed"), [(1.0, 1.0), (0.5, 0.5), (0.75, 0.25), (1.0, 0.7), (0.3, 2.5), (2.0, 0.0), (1e-3, 1e3)])
@pytest.mark.parametrize("update", ["plain", "first-order", "second-order"])
def test_the_parts_of_the_loss_keep_their_weights(fresh: float, replayed: float, update: str) -> None:
    factor, share = current_weights("vae", update, fresh, replayed)
    assert share is not None
    assert factor * (1 - share) == pytest.approx(fresh, rel=1e-9)
    assert factor * share == pytest.approx(replayed, rel=1e-15)
    assert torch.tensor(factor * share) == torch.tensor(replayed)  # in float32


def test_without_replay_the_weight_of_fresh_samples_is_the_factor() -> None:
    assert current_weights("none", "plain", 0.75, 0.25) == (0.75, None)


def test_a_pooled_update_never_used_them() -> None:
    assert current_weights("vae", "pooled", 0.75, 0.5) == (1.0, 0.4)
    assert current_weights("vae", "pooled", 0.75, 0.0) == (1.0, 0.0)
    assert current_weights("none", "pooled", 0.75, 0.5) == (1.0, None)


@pytest.mark.parametrize("fresh", [0.0, 1e-30])
def test_a_loss_of_replayed_samples_only_is_refused(tmp_path: Path, fresh: float) -> None:
    path = written(tmp_path, "a", f'extends = "digits"\n[replay]\nfresh_weight = {fresh}\nweight = 1.0\n')
    with pytest.raises(DfkdError, match=r"replay\.fresh_weight = .* replay\.share must be below 1") as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


BASES = {
    "nothing": ('name = "base"\n', (1.0, 1.0)),  # former defaults
    "none": ('extends = "digits-dfad"\n[objective]\nstudent_weight = 0.75\n', (0.75, 1.0)),
    "new keys": ('extends = "digits"\n[objective]\nstudent_weight = 4.0\n[replay]\nshare = 0.25\n', (3.0, 1.0)),
    "old keys": ('extends = "digits"\n[replay]\nfresh_weight = 3.0\nweight = 5.0\n', (3.0, 5.0)),
    "an old key": ('extends = "mnist-mad"\n[replay]\nweight = 5.0\n', (1.0, 5.0)),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("given", [{"fresh_weight": 0.5}, {"weight": 0.25}, {"fresh_weight": 0.5, "weight": 0.25}, {"weight": 0.0}])
@pytest.mark.parametrize("way", ["file", "overrides"])
def test_a_weight_that_is_left_out_is_that_of_the_base(tmp_path: Path, base: str, given: dict[str, float], way: str) -> None:
    text, (fresh, replayed) = BASES[base]
    path = written(tmp_path, "base", text)
    overrides: dict[str, Any] = {"replay.kind": "ema_generator"}
    if way == "file":
        lines = "".join(f"{key} = {value}\n" for key, value in given.items())
        path = written(tmp_path, "changed", f'extends = "base.toml"\n[replay]\nkind = "ema_generator"\n{lines}')
    else:
        overrides |= {f"replay.{key}": value for key, value in given.items()}
    recipe = load_recipe(path, overrides)
    expected = given.get("fresh_weight", fresh), given.get("weight", replayed)
    assert weights_of(recipe) == pytest.approx(expected, rel=1e-15)
    assert recipe.replay.replays == (expected[1] > 0)


def test_a_chain_of_old_keys_follows_the_last_kinds(tmp_path: Path) -> None:
    written(tmp_path, "a", 'extends = "digits-dfad"\n[replay]\nfresh_weight = 1.0\nweight = 0.25\n[update]\nkind = "pooled"\n')
    path = written(tmp_path, "b", 'extends = "a.toml"\n[replay]\nkind = "vae"\nrows = 16\n[update]\nkind = "plain"\n')
    assert weights_of(load_recipe(path)) == (1.0, 0.25)
    assert weights_of(load_recipe(path, {"replay.kind": "none"})) == (1.0, 0.0)
    assert weights_of(load_recipe(str(tmp_path / "a.toml"))) == (1.0, 0.0)


def test_a_new_key_over_old_ones_keeps_the_value_of_the_other(tmp_path: Path) -> None:
    path = written(tmp_path, "a", 'extends = "digits"\n[replay]\nfresh_weight = 3.0\nweight = 1.0\n')
    assert weights_of(load_recipe(path, {"replay.share": 0.5})) == (2.0, 2.0)
    assert weights_of(load_recipe(path, {"objective.student_weight": 1.0})) == (0.75, 0.25)


def test_a_section_that_is_replaced_has_the_former_defaults() -> None:
    recipe = load_recipe("mnist-mad", {"replay": {"kind": "ema_generator", "weight": 0.5}})
    assert weights_of(recipe) == (1.0, 0.5)


@pytest.mark.parametrize("current", ["replay.share", "objective.student_weight"])
def test_a_file_with_keys_of_both_kinds_is_refused(tmp_path: Path, current: str) -> None:
    section, key = current.split(".")
    content = {"replay": "weight = 0.5\n"}
    content[section] = content.get(section, "") + f"{key} = 0.5\n"
    path = written(tmp_path, "a", 'extends = "digits"\n' + "".join(f"[{name}]\n{lines}" for name, lines in content.items()))
    for arguments in ((path, {}), ("digits", {"replay.weight": 0.5, current: 0.5})):
        with pytest.raises(DfkdError, match=rf"replay\.weight is now replay\.share and objective\.student_weight, and {current} is given"):
            load_recipe(*arguments)


@pytest.mark.parametrize("value", ['"a"', "-1.0", "true", "[1.0]"])
@pytest.mark.parametrize("overrides", [{}, {"replay.share": 0.5}])
def test_a_wrong_value_is_refused_in_one_line(tmp_path: Path, value: str, overrides: dict[str, Any]) -> None:
    path = written(tmp_path, "a", f'extends = "digits"\n[replay]\nweight = {value}\n')
    with pytest.raises(DfkdError, match=r"replay\.weight = .*: must be a number ≥ 0") as caught:
        load_recipe(path, overrides)
    assert "\n" not in str(caught.value)


def test_a_recipe_is_printed_with_the_current_keys_only(tmp_path: Path) -> None:
    recipe = load_recipe("digits", {"replay.fresh_weight": 3.0})
    text = recipe_to_toml(recipe)
    assert "\nfresh_weight" not in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_recipe(written(tmp_path, "a", text)) == recipe


def test_they_are_warned_about_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", RenamedKeyWarning)
        for weight in (0.5, 0.25):
            load_recipe("digits", {"replay.fresh_weight": 0.5, "replay.weight": weight})
    assert [str(warning.message) for warning in caught] == [FORMER_WEIGHTS_REPLACED]


def test_keywords_in_python_work_with_a_warning() -> None:
    with pytest.warns(RenamedKeyWarning, match=f"^{FORMER_WEIGHTS_REPLACED}$"):
        replay = Replay(kind="vae", fresh_weight=3.0, weight=1.0)
    expected = Method(objective=Objective(student_weight=4.0), replay=Replay(kind="vae", share=0.25))
    for same in (replay, dataclasses.replace(Replay(kind="vae", fresh_weight=3.0, weight=5.0), weight=1.0), copy.deepcopy(replay)):
        assert Method(replay=same) == expected
    assert Method(replay=pickle.loads(pickle.dumps(replay))) == expected
    assert weights_of(Method(replay=dataclasses.replace(replay, rows=4))) == (3.0, 1.0)
    assert weights_of(Method(replay=dataclasses.replace(replay, kind="none"))) == (3.0, 0.0)
    assert weights_of(Method(replay={"kind": "vae", "weight": 0.5})) == (1.0, 0.5)  # type: ignore[arg-type]
    assert weights_of(Method(replay=Replay(kind="vae", weight=0.5))) == (1.0, 0.5)
    assert not Replay(kind="vae", weight=0.0).replays


def test_a_method_is_independent_of_the_former_weights_that_made_it() -> None:
    method = Method(replay=Replay(kind="vae", fresh_weight=3.0, weight=1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        changed = dataclasses.replace(method, replay=dataclasses.replace(method.replay, share=0.5), update=Update(kind="pooled"))
    assert weights_of(changed) == (2.0, 2.0)


def test_keywords_of_both_kinds_are_refused_in_python() -> None:
    with pytest.raises(TypeError, match=r"replay\.weight is now .* replay\.share is given as well"):
        Replay(kind="vae", share=0.5, weight=0.5)
    with pytest.raises(TypeError, match=r"replay\.weight is now .* replay\.share is given as well"):
        dataclasses.replace(Replay(kind="vae"), weight=0.5)
    with pytest.raises(ValidationError, match="both are given"):
        Replay(kind="vae", share=0.25, fresh_weight=0.5, weight=0.5)
    with pytest.raises(ValidationError, match="both are given"):
        Method(objective=Objective(student_weight=2.0), replay=Replay(kind="vae", weight=0.5))


def old_state(state: dict[str, Any], fresh: float, replayed: float) -> dict[str, Any]:
    """Returns a checkpoint as earlier versions wrote it."""
    method = copy.deepcopy(state["method"])
    del method["objective"]["student_weight"], method["replay"]["share"]
    method["replay"] |= {"fresh_weight": fresh, "weight": replayed}
    return state | {"method": method}


@pytest.mark.parametrize("kind", ["none", "ema_generator"])
def test_a_checkpoint_with_them_resumes_and_another_is_refused(make_trainer: MakeTrainer, kind: str) -> None:
    method = small_method(replay=Replay(kind=kind, fresh_weight=3.0, weight=1.0))
    trainer = make_trainer(method)
    state = trainer.state_dict()
    make_trainer(method).load_state_dict(old_state(state, 3.0, 1.0))
    with pytest.raises(DfkdError, match=r"objective\.student_weight = .*: the state is of a run with"):
        trainer.load_state_dict(old_state(state, 1.0, 1.0))


@pytest.mark.parametrize("update", ["plain", "pooled"])
@pytest.mark.parametrize("kind", ["none", "ema_generator", "memory_bank"])
@pytest.mark.parametrize("share", [0.0, 0.25])
def test_the_students_loss_has_the_same_scale_for_every_replay(make_trainer: MakeTrainer, update: Any, kind: str, share: float) -> None:
    """All rows have the same discrepancy, so the loss is the factor times it whatever is replayed, also while the bank is empty."""
    method = small_method(replay=Replay(kind=kind, share=share))
    method = dataclasses.replace(method, objective=Objective(student_weight=3.0), update=Update(kind=update))
    trainer = make_trainer(method)
    for network, bias in ((trainer.state.teacher, 0.5), (trainer.state.student, 2.0)):
        last = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
        with torch.no_grad():
            last.weight.zero_()
            assert last.bias is not None
            last.bias.fill_(bias)
    assert student_step(trainer.state)["student"].item() == pytest.approx(3.0 * 1.5, rel=1e-6)


@pytest.mark.parametrize("update", ["plain", "first-order", "second-order"])
def test_the_parts_of_a_batch_have_the_weights_of_the_recipe(
    make_trainer: MakeTrainer, update: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = small_method(replay=Replay(kind="memory_bank", share=0.25, rows=4))
    trainer = make_trainer(dataclasses.replace(method, objective=Objective(student_weight=4.0), update=Update(kind=update)))
    seen: list[list[tuple[int, float]]] = []
    original = Update.backward

    def backward(self: Update, student: Any, batch: Any, *arguments: Any, **keywords: Any) -> torch.Tensor:
        seen.append([tuple(part) for part in batch.parts])
        return original(self, student, batch, *arguments, **keywords)

    monkeypatch.setattr(Update, "backward", backward)
    student_step(trainer.state)
    source = trainer.state.replay_source
    assert source is not None
    for epoch in range(1, 6):
        source.end_epoch(epoch, trainer.state.fresh_batch)
    student_step(trainer.state)
    rows = len(trainer.state.latents)
    assert seen == [[(rows, 4.0)], [(rows, 3.0), (4, 1.0)]]


def test_recipes_of_papers_that_add_both_discrepancies_weigh_each_by_one() -> None:
    recipes: dict[str, Recipe] = {name: load_recipe(name) for name in ("mnist-mad", "cifar10-mad", "mnist-retain", "cifar10-retain-bank")}
    assert {name: weights_of(recipe) for name, recipe in recipes.items()} == dict.fromkeys(recipes, (1.0, 1.0))
