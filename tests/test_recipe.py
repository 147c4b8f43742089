import math
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dfkd_fast import DfkdError, Loop, Recipe, Trainer, load_recipe
from dfkd_fast.models import build_generator, build_model, sample
from dfkd_fast.recipe import recipe_from_toml, recipe_to_toml
from dfkd_fast.recipe_files import shipped_recipes
from dfkd_fast.surgery import get_logits
from tests.small import small_method, small_networks


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_is_printed_completely_and_read_back_equal(name: str) -> None:
    recipe = load_recipe(name)
    text = recipe_to_toml(recipe)
    assert recipe_from_toml(text, name) == recipe
    printed = tomllib.loads(text)
    assert set(vars(recipe)) == set(printed)
    assert set(vars(recipe.loop)) == set(printed["loop"])
    assert recipe.description
    assert recipe.provenance


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("loop.epochs", 0, "loop.epochs = 0: must be a whole number ≥ 1"),
        ("loop.epochs", "3", "loop.epochs = '3': must be a whole number ≥ 1"),
        ("loop.epochs", True, "loop.epochs = True: must be a whole number ≥ 1"),
        ("loop.epochs", 2.5, "loop.epochs = 2.5: must be a whole number ≥ 1"),
        ("loop.epoch", 3, "unknown key 'loop.epoch': did you mean 'loop.epochs'?"),
        ("lop", {}, "unknown key 'lop': did you mean 'loop'?"),
        ("loop", 3, "loop = 3: must be a section"),
        ("engine.channels_last", 1, "engine.channels_last = 1: must be true or false"),
        ("replay.ema_generator.decay", 1.5, "replay.ema_generator.decay = 1.5: must be a number ≥ 0 and ≤ 1"),
        ("replay.kind", "ema", "replay.kind = 'ema': unknown choice 'ema': did you mean 'ema_generator'?"),
        ("objective.discrepancy", "l2", "must be one of js, kl, l1"),
        ("student_optimizer.lr", float("nan"), "student_optimizer.lr = nan: must be a number ≥ 1e-38"),
        ("student_optimizer.lr", 0, "student_optimizer.lr = 0: must be a number ≥ 1e-38"),
        ("student_optimizer.betas", [0.1], "student_optimizer.betas.1 is missing"),
        ("data.mean", [0.1, 0.2], "data: mean has 2 numbers for 1 channels"),
        ("data.std", [0.0], "data.std.0 = 0.0"),
        ("seed", -1, "seed = -1: must be a whole number ≥ 0"),
        ("seed.x", 1, "seed is not a section"),
    ],
)
def test_what_is_not_allowed_is_named_with_its_field_value_and_range(path: str, value: Any, message: str) -> None:
    with pytest.raises(DfkdError) as caught:
        load_recipe("digits", {"seed": 0, path: value})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_whole_number_passes_for_a_real_one() -> None:
    assert load_recipe("digits", {"student_optimizer.lr": 1}).student_optimizer.lr == 1.0


def test_a_misspelt_recipe_gets_the_nearest_name() -> None:
    with pytest.raises(DfkdError, match=r"unknown recipe 'digit-dfad': did you mean 'digits-dfad'\?"):
        load_recipe("digit-dfad")


def test_settings_made_in_python_are_validated_too() -> None:
    with pytest.raises(ValueError, match="epochs"):
        Loop(epochs=0)


def test_a_file_states_only_what_differs_from_what_it_extends(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('extends = "digits"\n[loop]\nepochs = 3\n')
    assert load_recipe(str(path)) == load_recipe("digits", {"loop.epochs": 3, "name": "mine"})


def test_a_path_that_a_file_extends_is_relative_to_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    (tmp_path / "there" / "base.toml").write_text('extends = "digits"\nseed = 1\n')
    (tmp_path / "base.toml").write_text('extends = "digits"\nseed = 2\n')
    (tmp_path / "here" / "mine.toml").write_text('extends = "../there/mine.toml"\n')
    (tmp_path / "there" / "mine.toml").write_text('extends = "base.toml"\n')
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("here/mine.toml")
    assert (recipe.name, recipe.seed) == ("mine", 1)


def test_a_chain_of_files_may_be_long(tmp_path: Path) -> None:
    for number in range(1500):
        (tmp_path / f"{number}.toml").write_text(f'extends = "{number + 1}.toml"\n[provenance]\nlast = "{number}"\n')
    (tmp_path / "1500.toml").write_text('extends = "digits"\nseed = 5\n')
    recipe = load_recipe(str(tmp_path / "0.toml"))
    assert (recipe.name, recipe.seed, recipe.provenance["last"]) == ("0", 5, "0")


def test_a_byte_order_mark_is_ignored_in_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('extends = "digits"\n[loop]\nepochs = 3\n', encoding="utf-8-sig")
    assert load_recipe(str(path)).loop.epochs == 3


@pytest.mark.parametrize("seed", [0, 2**32, 2**63 - 1])
def test_the_largest_seed_makes_networks_and_latents(seed: int) -> None:
    method = small_method(iterations=1, epochs=1)
    trainer = Trainer(*small_networks(seed), method, seed=seed)
    assert trainer.sample(4).isfinite().all()


def test_a_file_cannot_extend_itself(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'extends = "{path}"\n')
    with pytest.raises(DfkdError, match="extends itself"):
        load_recipe(str(path))


@pytest.mark.parametrize(("text", "message"), [("loop = [", "is not TOML"), ("extends = 3", "must be the name"), (None, "cannot be read")])
def test_an_unusable_file_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "mine.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DfkdError, match=message):
        load_recipe(str(path))


@pytest.mark.parametrize("name", ["digits-mad", "digits-bank", "digits-vae", "digits-retain", "digits-retain-first-order"])
def test_the_methods_on_digits_differ_only_in_replay_and_update(name: str) -> None:
    dfad, other = load_recipe("digits-dfad"), load_recipe(name)
    for section in (
        "data",
        "teacher",
        "teacher_optimizer",
        "student",
        "generator",
        "objective",
        "student_optimizer",
        "generator_optimizer",
    ):
        assert getattr(other, section) == getattr(dfad, section)
    loop = dfad.loop
    assert (other.loop.epochs, other.loop.iterations_per_epoch, other.loop.student_steps) == (
        loop.epochs,
        loop.iterations_per_epoch,
        loop.student_steps,
    )
    assert other.loop.batch_size + other.replay.num_rows(other.loop.batch_size) == loop.batch_size
    assert not dfad.replay.replays


@pytest.mark.parametrize("name", ["mad", "bank", "pool", "pre", "retain"])
def test_the_replays_on_cifar10_cpu_differ_from_it_in_nothing_else(name: str) -> None:
    base, other = load_recipe("cifar10-cpu"), load_recipe(f"cifar10-cpu-{name}")
    assert other.replay.replays and not base.replay.replays
    # As long as cifar10-cpu in time, and so shorter in iterations.
    loop = replace(other.loop, iterations_per_epoch=base.loop.iterations_per_epoch)
    assert other.loop.iterations_per_epoch < base.loop.iterations_per_epoch
    texts: dict[str, Any] = {"name": base.name, "description": base.description, "provenance": base.provenance}
    assert replace(other, loop=loop, replay=base.replay, update=base.update, **texts) == base


SHALLOWER = {
    **dict.fromkeys(("cifar_resnet34", "cifar_resnet18", "wrn40_2"), "wrn10_1"),
    "torchvision:resnet50": "torchvision:resnet18",
    "deeplabv3_resnet50": "deeplabv3_mobilenet_v2",
}
"""Networks as deep as a test can wait for, by the name of a deeper one."""


SIZE = 64
"""Largest images on which a test trains."""


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_networks_of_a_shipped_recipe_run_an_iteration(name: str) -> None:
    shipped = load_recipe(name)
    # At full depth and size, only shapes are computed.
    data = shipped.data
    with torch.device("meta"):
        images = torch.empty(2, data.channels, data.image_size, data.image_size)
        if data.image_size > SIZE:
            assert sample(generator_of(shipped), 2, "meta").shape == images.shape
        for model in (shipped.teacher.model, shipped.student.model):
            logits = get_logits(build_model(model, data.num_classes, data.channels)(images))
            assert logits.shape[:2] == (2, data.num_classes)
            assert logits.shape[2:] in ((), images.shape[2:])
    recipe = load_recipe(
        name,
        {
            "data.image_size": min(data.image_size, SIZE),
            "generator.image_size": shipped.generator.image_size and SIZE // 2,
            "loop.batch_size": 2,
            "loop.epochs": 1,
            "loop.iterations_per_epoch": 1,
            "loop.student_steps": 1,
            "loop.generator_steps": 1,
            "loop.generator_pretraining": 0,
            "generator.width": 4,
            "replay.rows": 2,
            "replay.vae.width": 4,
            "student_optimizer.milestones": [],
            "generator_optimizer.milestones": [],
        },
    )
    teacher, student = (
        build_model(SHALLOWER.get(model, model), data.num_classes, data.channels) for model in (recipe.teacher.model, recipe.student.model)
    )
    trainer = Trainer(teacher, student, generator_of(recipe), recipe)
    trainer.fit()
    assert all(math.isfinite(loss) for loss in trainer.history[0].losses.values())


def generator_of(recipe: Recipe) -> nn.Module:
    data = recipe.data
    return build_generator(recipe.generator, data.channels, data.image_size, mean=data.mean, std=data.std, num_classes=data.num_classes)


def test_mnist_dfad_is_the_papers_setting() -> None:
    recipe = load_recipe("mnist-dfad")
    assert (recipe.teacher.model, recipe.student.model) == ("lenet5", "lenet5_half")
    assert (recipe.generator.model, recipe.generator.latent_dim, recipe.generator.width) == ("A", 100, 64)
    assert (recipe.loop.batch_size, recipe.loop.epochs, recipe.loop.iterations_per_epoch) == (512, 40, 50)
    assert (recipe.loop.student_steps, recipe.loop.generator_steps) == (5, 1)
    student, generator = recipe.student_optimizer, recipe.generator_optimizer
    assert (student.kind, student.lr, student.momentum, student.weight_decay, student.schedule) == ("sgd", 0.01, 0.9, 1e-4, "constant")
    assert (generator.kind, generator.lr, generator.betas, generator.weight_decay) == ("adam", 1e-3, (0.9, 0.999), 0.0)
    assert (recipe.objective.discrepancy, recipe.objective.adversary, recipe.replay.kind) == ("l1", "l1", "none")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", ""),
        ("name", "../up"),
        ("name", ".."),
        ("name", "a\0b"),
        ("seed", 2**64),
        ("data.num_classes", 10**14),
        ("data.batch_size", 10**20),
        ("student_optimizer.betas", [1.0, 1.0]),
        ("objective.temperature", 1e5),
    ],
)
def test_values_beyond_what_can_be_computed_with_are_refused(path: str, value: object) -> None:
    with pytest.raises(DfkdError, match=re.escape(path)) as caught:
        load_recipe("digits", {path: value})
    assert "\n" not in str(caught.value)
