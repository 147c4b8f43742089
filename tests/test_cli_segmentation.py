"""Distilling and evaluating segmenters from the command line, on the toy that needs no files."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.functional import pil_to_tensor

from dfkd_fast.data import DataSettings, class_names, palette
from dfkd_fast.report import read_run
from tests.command_line import Run

TINY = [
    *("--set", "loop.epochs=2", "--set", "loop.iterations_per_epoch=1", "--set", "loop.student_steps=1", "--set", "loop.batch_size=4"),
    *("--set", "teacher.epochs=1", "--set", "report.samples=4", "--set", "report.samples_every=1"),
]
SHAPES = DataSettings(name="shapes", num_classes=4, channels=3, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def test_a_student_that_saw_no_data_labels_nine_tenths_as_well_as_its_teacher(run: Run, tmp_path: Path) -> None:
    result = run("distill", "shapes", "--out", tmp_path / "run", "--set", "loop.epochs=6")
    assert result.code == 0, result.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metric"] == "mIoU"
    assert summary["teacher_accuracy"] > 85
    assert summary["student_accuracy"]["last"] > 0.9 * summary["teacher_accuracy"]


@pytest.fixture
def tiny_run(run: Run, tmp_path: Path) -> Path:
    result = run("distill", "shapes", "--out", tmp_path / "tiny", *TINY)
    assert result.code == 0, result.err
    assert "mIoU" in result.out
    assert all(name in result.out for name in class_names(SHAPES))
    return tmp_path / "tiny"


def test_the_summary_has_the_iou_of_each_class_of_teacher_and_student(tiny_run: Path) -> None:
    summary = json.loads((tiny_run / "summary.json").read_text())
    for player, miou in (("teacher", summary["teacher_accuracy"]), ("student", summary["student_accuracy"]["last"])):
        iou = summary["iou"][player]
        assert list(iou) == class_names(SHAPES)
        assert sum(iou.values()) / 4 == pytest.approx(miou)


def test_sample_grids_show_each_image_with_the_label_maps_of_both_in_the_data_set_s_colours(tiny_run: Path) -> None:
    assert sorted(path.name for path in (tiny_run / "samples").iterdir()) == ["epoch-0001.png", "epoch-0002.png"]
    pixels = pil_to_tensor(Image.open(tiny_run / "samples" / "epoch-0002.png"))
    side, gap = 32, 3
    assert pixels.shape == (3, 4 * (side + gap) + gap, 3 * side + 2 * gap)
    colours = palette(SHAPES).tolist()
    maps = pixels[:, gap : gap + side, gap + side : -gap].flatten(1).T.unique(dim=0).tolist()
    assert all(colour in colours for colour in maps)


def test_evaluating_a_run_gives_both_networks_metrics(tiny_run: Path, run: Run, tmp_path: Path) -> None:
    result = run("evaluate", tiny_run, "--json", tmp_path / "figures.json")
    assert result.code == 0, result.err
    assert "of the pixels" in result.out
    summary = json.loads((tiny_run / "summary.json").read_text())
    student, teacher = json.loads((tmp_path / "figures.json").read_text())
    assert student["miou"] == pytest.approx(summary["student_accuracy"]["last"])
    assert teacher["miou"] == pytest.approx(summary["teacher_accuracy"])
    assert student["iou"] == pytest.approx(summary["iou"]["student"])
    assert (student["count"], teacher["agreement"]) == (128, None)
    assert student["agreement"]["reference"].endswith("teacher.safetensors")
    assert 0 < student["pixel_accuracy"] <= 100


def test_teaching_alone_prints_the_iou_of_each_class(run: Run, tmp_path: Path) -> None:
    result = run("teach", "shapes", "--out", tmp_path / "teacher", *TINY)
    assert result.code == 0, result.err
    assert all(name in result.out for name in class_names(SHAPES))


def test_a_segmenter_trained_before_with_the_focal_loss_gives_the_same_student(run: Run, tmp_path: Path) -> None:
    options = [*TINY, "--set", "teacher.focal_gamma=2.0"]
    assert run("distill", "shapes", "--out", tmp_path / "whole", *options).code == 0
    assert run("teach", "shapes", "--out", tmp_path / "teacher", *options).code == 0
    assert (
        run("distill", "shapes", "--out", tmp_path / "other", "--teacher", tmp_path / "teacher" / "teacher.safetensors", *options).code == 0
    )
    whole, other = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "other"))
    assert whole["iou"] == other["iou"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.num_classes=5", "num_classes"),
        ("student.model=lenet5_half", "lenet5_half|student"),
        ("teacher.encoder_weights=efficientnet_lite0", "has no encoder"),
        ("objective.class_nll=1.0", "objective.class_nll = 1.0"),
        ("teacher.focal_gamma=-1", "teacher.focal_gamma = -1: must be a number ≥ 0"),
    ],
)
def test_what_does_not_fit_a_segmentation_is_one_line(run: Run, tmp_path: Path, change: str, message: str) -> None:
    conditional = ["--set", "generator.conditional=true"] if "class_nll" in change else []
    result = run("distill", "shapes", "--out", tmp_path / "run", *TINY, "--set", change, *conditional)
    assert result.code == 2
    assert len(result.err.splitlines()) == 1
    assert re.search(message, result.err)


@pytest.mark.parametrize("player", ["teacher", "student"])
def test_weights_that_do_not_fit_an_encoder_are_refused_before_the_folder_exists(run: Run, tmp_path: Path, player: str) -> None:
    result = run("distill", "shapes", "--out", tmp_path / "run", *TINY, "--set", f"{player}.encoder_weights=missing.pth")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert not (tmp_path / "run").exists()


def test_a_student_can_start_from_its_teachers_encoder(run: Run, tmp_path: Path) -> None:
    models = ["--set", "teacher.model=lraspp:mobilenetv3_small_050", "--set", "student.model=lraspp:mobilenetv3_small_050/4"]
    options = [*models, "--set", "student.encoder_weights=teacher", "--set", "student_optimizer.lr=1e-12", "--set", "engine.precision=fp32"]
    result = run("distill", "shapes", "--out", tmp_path / "run", *TINY, *options)
    assert result.code == 0, result.err
    student, teacher = (load_file(tmp_path / "run" / f"{name}.safetensors") for name in ("student", "teacher"))
    weights = [name for name in student if name.startswith("backbone") and name.endswith("weight")]
    assert len(weights) > 10
    for name in weights:
        torch.testing.assert_close(student[name], teacher[name])


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    """A set in SegNet's layout: dark images are sky, bright ones buildings."""
    for split, count in (("train", 4), ("test", 3)):
        for number in range(count):
            image = Image.new("RGB", (40, 32), (40 + 150 * (number % 2),) * 3)
            label = Image.new("L", (40, 32), number % 2)
            label.paste(11, (0, 0, 5, 5))
            for folder, file in ((split, image), (f"{split}annot", label)):
                (tmp_path / "camvid" / folder).mkdir(parents=True, exist_ok=True)
                file.save(tmp_path / "camvid" / folder / f"{number}.png")
    return tmp_path / "camvid"


CAMVID = [
    *("--set", "data.name=camvid", "--set", "data.num_classes=11", "--set", "data.resize=32", "--set", "teacher.batch_size=2"),
    *("--set", "teacher.focal_gamma=2.0", "--set", "teacher.augment=shift_flip"),
]


def test_files_on_disk_are_trained_distilled_and_evaluated(camvid: Path, run: Run, tmp_path: Path) -> None:
    result = run("distill", "shapes", "--out", tmp_path / "run", *TINY, *CAMVID, "--data-root", camvid)
    assert result.code == 0, result.err
    assert "the result is not comparable to published camvid mIoU" in result.out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary["iou"]["teacher"])[:2] == ["sky", "building"]
    assert run("evaluate", tmp_path / "run", "--data-root", camvid).code == 0


@pytest.mark.parametrize("command", ["distill", "teach"])
def test_a_broken_test_image_is_an_error_unless_it_may_be_left_out(camvid: Path, run: Run, tmp_path: Path, command: str) -> None:
    (camvid / "test" / "1.png").write_bytes(b"no image")
    result = run(command, "shapes", "--out", tmp_path / "strict", *TINY, *CAMVID, "--data-root", camvid)
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "1 of 3 images cannot be decoded" in result.err
    assert not (tmp_path / "strict").exists()  # nothing was trained yet
    options = ["--set", "data.strict=false", "--data-root", camvid]
    assert run(command, "shapes", "--out", tmp_path / "lenient", *TINY, *CAMVID, *options).code == 0


def test_compared_runs_are_labelled_by_their_metric(tiny_run: Path, run: Run, tmp_path: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "again")
    result = run("compare", tiny_run, tmp_path / "again", "--out", tmp_path / "plot.png")
    assert result.code == 0, result.err
    assert read_run(tiny_run).metric == "mIoU"


def test_doctor_checks_a_segmenter(tiny_run: Path, run: Run) -> None:
    result = run("doctor", "--teacher", "shapes", "--weights", tiny_run / "teacher.safetensors")
    assert "mIoU" in result.out
    assert "folding" in result.out
