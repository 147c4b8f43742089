from collections.abc import Sized
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.utils.data import Subset

from bench import table, with_data
from bench.__main__ import main
from bench.provenance import commit
from dfkd_fast import DfkdError, NonFiniteLossError, Optimizer, Recipe, Trainer, load_recipe
from dfkd_fast.commands.networks import build_network, build_networks
from dfkd_fast.data import batches, open_split
from dfkd_fast.engine.teach import TeacherTrainer
from dfkd_fast.models import save_weights
from dfkd_fast.recipe import recipe_to_toml
from dfkd_fast.surgery import eval_mode

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A short DFAD on the digits, with a teacher of six epochs."""
    small = load_recipe(
        "digits-dfad",
        {"loop.epochs": 3, "loop.iterations_per_epoch": 2, "loop.student_steps": 3, "loop.batch_size": 24, "loop.evaluate_every": 2},
    )
    teacher, stream = build_network(small, "teacher"), torch.Generator().manual_seed(0)
    split = open_split(small.data, "train")
    training = TeacherTrainer(
        *(teacher, batches(split, 64, shuffle=True, generator=stream), small.teacher_optimizer, 6, stream, split[0][0][None], CPU)
    )
    for _ in training:
        pass
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_weights(teacher, path, {})
    return replace(
        small, teacher=replace(small.teacher, weights=str(path)), objective=replace(small.objective, discrepancy="kl", attention=5.0)
    )


def test_the_student_sees_as_many_real_images_as_generated_ones_in_a_run(recipe: Recipe) -> None:
    lines: list[str] = []
    row = with_data.measure(recipe, CPU, "a command", lines.append)
    assert row.student_samples == 3 * 2 * 3 * 24
    assert [line.split()[1] for line in lines if line.startswith("student")] == ["2/3", "3/3"]
    assert f"{row.student_accuracy:.2f} %" in lines[-1]
    assert (row.recipe, row.student, row.seed, row.provenance.commit) == ("digits-dfad", "lenet5_half", 0, commit())


def test_batches_are_training_images_with_the_teachers_outputs_for_them_and_do_not_end(recipe: Recipe) -> None:
    teacher, student, generator = build_networks(recipe, CPU)
    state = Trainer(teacher, student, generator, recipe).state
    split = open_split(recipe.data, "train", augment=recipe.teacher.augment)
    assert isinstance(split, Sized)
    known = {image.numpy().tobytes() for image, _ in (split[index] for index in range(len(split)))}
    seen = 0
    for batch in islice(with_data._labelled_batches(state, recipe), len(split) // 24 + 2):
        assert all(image.contiguous().numpy().tobytes() in known for image in batch.images)
        with torch.no_grad(), eval_mode(teacher):
            torch.testing.assert_close(batch.teacher_logits, teacher(batch.images), rtol=1e-4, atol=1e-5)
        assert batch.teacher_features is not None and len(batch.teacher_features) == len(batch.images)
        assert [part.weight for part in batch.parts] == [1.0]
        seen += len(batch.images)
    assert seen > len(split)


def test_the_student_learns_the_teacher(recipe: Recipe) -> None:
    row = with_data.measure(replace(recipe, loop=replace(recipe.loop, iterations_per_epoch=25)), CPU, "", lambda _: None)
    assert row.teacher_accuracy > 80
    assert row.student_accuracy > row.teacher_accuracy - 10


def test_a_loss_that_is_not_finite_ends_the_run_in_its_epoch(recipe: Recipe) -> None:
    diverging = replace(recipe, student_optimizer=Optimizer(lr=1e30))
    with pytest.raises(NonFiniteLossError, match=r"the student's loss is .* in epoch 1"):
        with_data.measure(diverging, CPU, "", lambda _: None)


def test_a_single_image_is_no_batch_and_not_an_endless_loop(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(with_data, "open_split", lambda *_, **__: Subset(open_split(recipe.data, "train"), [0]))
    with pytest.raises(DfkdError, match="no batch of training images"):
        with_data.measure(recipe, CPU, "", lambda _: None)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["bench", "with-data", "--device", "cpu", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return 0 if ended.value.code is None else int(ended.value.code)


def test_the_command_writes_a_row_with_the_recipes_seed_and_metric(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "short.toml"
    file.write_text(recipe_to_toml(replace(recipe, seed=5, data=replace(recipe.data, holdout=100))))
    assert run(monkeypatch, "--recipe", file, "--data-root", "", "--out", tmp_path / "rows.csv") == 0
    (row,) = table.read(tmp_path / "rows.csv")
    assert (row["seed"], row["metric"]) == ("5", "top-1 accuracy (100 held-out training images)")
    assert f"{float(row['student_accuracy']):.2f} %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "{folder}"), "is a folder"),
        (("--out", "{folder}/none/rows.csv"), "there is no folder"),
        (("--out", "{folder}/foreign.csv"), "has other columns"),
        (("--threads", "0"), "'--threads'"),
    ],
)
def test_what_cannot_be_written_or_run_is_refused_before_the_work(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "foreign.csv").write_text("a,b\n1,2\n")
    monkeypatch.setattr(with_data, "measure", None)
    assert run(monkeypatch, "--data-root", "", *(one.format(folder=tmp_path) for one in arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert (tmp_path / "foreign.csv").read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine.micro_batches": 2}, "must be 1"),
        ({"teacher.weights": ""}, "needs a trained teacher"),
        ({"replay.kind": "ema_generator"}, "must be 'none'"),
    ],
)
def test_a_recipe_without_teacher_weights_with_replay_or_micro_batches_is_refused(changes: dict[str, object], message: str) -> None:
    recipe = load_recipe("digits-dfad", {"teacher.weights": "any.safetensors"} | changes)
    with pytest.raises(DfkdError, match=message):
        with_data.measure(recipe, CPU, "", lambda _: None)
