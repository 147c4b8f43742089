"""Distillation from given weights where the data set is not on this machine: agreement on generated samples instead of accuracy."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dfkd_fast import Trainer
from dfkd_fast.engine.agreement import AGREEMENT_SAMPLES, agreement
from dfkd_fast.models import build_model, sample, save_weights, shipped
from tests.command_line import Run
from tests.small import small_method, small_networks

TINY = [
    *("--set", "loop.epochs=2", "--set", "loop.iterations_per_epoch=2", "--set", "loop.batch_size=8", "--set", "loop.student_steps=1"),
    *("--set", "generator.width=2", "--set", "report.samples=9"),
]


@pytest.fixture
def teachers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of shipped teachers with one untrained LeNet5."""
    folder = tmp_path / "teachers"
    folder.mkdir()
    torch.manual_seed(0)
    save_weights(build_model("lenet5", 10, 1), folder / "mnist-lenet5.safetensors", {"role": "teacher"})
    monkeypatch.setattr(shipped, "FOLDER", folder)
    return folder


def test_the_agreement_is_the_share_of_samples_with_the_same_class() -> None:
    trainer = Trainer(*small_networks(), small_method())
    images = sample(trainer.generator, AGREEMENT_SAMPLES, "cpu")
    with torch.no_grad():
        same = trainer.teacher.eval()(images).argmax(1) == trainer.student.eval()(images).argmax(1)
    assert agreement(trainer.state) == pytest.approx(100 * same.double().mean().item())


def test_a_student_that_is_the_teacher_agrees_on_all_samples() -> None:
    trainer = Trainer(*small_networks(student="lenet5"), small_method())
    trainer.student.load_state_dict(trainer.teacher.state_dict())
    assert agreement(trainer.state) == 100


def test_the_agreement_changes_no_bit_of_the_training() -> None:
    plain = Trainer(*small_networks(), small_method())
    measured = Trainer(*small_networks(), small_method(), measure_agreement=True)
    for ours, theirs in zip(plain.fit().parameters(), measured.fit().parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [epoch.agreement for epoch in plain.history] == [None, None]
    assert all(epoch.agreement is not None and epoch.student_accuracy is None for epoch in measured.history)


def test_a_shipped_teacher_is_distilled_without_data(run: Run, teachers: Path, tmp_path: Path) -> None:
    result = run("distill", "mnist-cpu", "--teacher", "shipped:mnist-lenet5", "--out", "here", *TINY)
    assert result.code == 0, result.err
    assert (
        "data.root is not set: no accuracy is measured, but the student's agreement with the teacher on 1,000 generated samples"
        in result.out
    )
    summary: dict[str, Any] = json.loads((tmp_path / "here" / "summary.json").read_text())
    assert summary["teacher_accuracy"] is summary["student_accuracy"] is summary["retention"] is None
    epochs = [json.loads(line) for line in (tmp_path / "here" / "metrics.jsonl").read_text().splitlines()]
    assert summary["agreement"] == {
        "last": epochs[-1]["agreement"],
        "best": max(epoch["agreement"] for epoch in epochs),
        "samples": AGREEMENT_SAMPLES,
    }
    assert f"{epochs[-1]['agreement']:.2f} % of 1,000 generated samples" in result.out
    assert not (tmp_path / "here" / "student-best-on-test.safetensors").exists()
    report = (tmp_path / "here" / "report.html").read_text()
    assert f"<b>{epochs[-1]['agreement']:.2f} %</b>\n<span>1,000 generated samples</span>" in report
    assert "was not evaluated" not in report


def test_without_data_and_without_weights_there_is_nothing_to_train_the_teacher_on(run: Run) -> None:
    result = run("distill", "mnist-dfad", *TINY)
    assert result.code == 2
    assert "needs the folder that holds it" in result.err


def test_an_unknown_shipped_teacher_is_one_line_with_those_that_exist(run: Run, teachers: Path) -> None:
    result = run("distill", "mnist-cpu", "--teacher", "shipped:mnist-lenet", "--out", "here")
    assert result.code == 2
    assert result.err == "dfkd-fast: unknown shipped teacher 'mnist-lenet': did you mean 'mnist-lenet5'? must be one of mnist-lenet5\n"
    assert not Path("here").exists()


def test_a_shipped_teacher_is_evaluated_by_its_name(run: Run, teachers: Path) -> None:
    result = run("evaluate", "shipped:mnist-lenet5", "--recipe", "mnist-cpu", "--role", "teacher", "--data-root", "nowhere")
    assert result.code == 2
    assert "nowhere does not exist" in result.err  # the weights were found


def test_teach_trains_where_the_recipe_uses_a_shipped_teacher(run: Run, teachers: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('extends = "digits"\n[teacher]\nweights = "shipped:mnist-lenet5"\nepochs = 1\nevaluate_every = 1\n')
    result = run("teach", recipe, "--out", "here")
    assert result.code == 0, result.err
    assert "teacher 1/1" in result.out
    (epoch,) = [json.loads(line) for line in (tmp_path / "here" / "teacher-metrics.jsonl").read_text().splitlines()]
    assert epoch["student_accuracy"] is not None and epoch["losses"]["teacher"] > 0
    assert (tmp_path / "here" / "teacher-curves.png").stat().st_size > 1000
    assert 'weights = ""' in (tmp_path / "here" / "recipe.toml").read_text()


def test_held_out_images_that_weights_were_trained_on_are_noted_wherever_they_are_evaluated(run: Run) -> None:
    assert run("teach", "digits", "--out", "trained", "--set", "teacher.epochs=1").code == 0
    line = "data.holdout = 200: the teacher trained/teacher.safetensors was trained with data.holdout = 0"
    result = run("evaluate", "trained/teacher.safetensors", "--set", "data.holdout=200")
    assert result.code == 0 and line in result.out.replace("\n", " ")
    assert line not in run("evaluate", "trained/teacher.safetensors").out


def test_teach_says_that_it_trains_nothing_where_weights_are_given(run: Run) -> None:
    assert run("teach", "digits", "--out", "trained", "--set", "teacher.epochs=1").code == 0
    result = run("teach", "digits", "--out", "again", "--set", "teacher.weights=trained/teacher.safetensors")
    assert result.code == 0
    assert "this teacher is tested, and none is trained; --set teacher.weights= trains one" in result.out


def test_teach_warns_of_a_teacher_at_chance(run: Run) -> None:
    result = run("teach", "digits", "--out", "here", "--set", "teacher.epochs=1", "--set", "teacher_optimizer.lr=1e-12")
    assert result.code == 0
    assert "which is chance (10.00 %)" in result.out


def test_a_shipped_teacher_of_another_network_is_refused_with_the_setting_that_fits(run: Run) -> None:
    result = run("distill", "cifar10-mad", "--teacher", "shipped:cifar10-wrn16_2", "--out", "here")
    assert result.code == 2
    assert "teacher.model = 'cifar_resnet34': shipped:cifar10-wrn16_2 is a wrn16_2; use --set teacher.model=wrn16_2" in result.err
    assert not Path("here").exists()
