"""The command line: names and files are a contract, errors are one line."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dfkd_fast import Trainer, __version__
from dfkd_fast.models import read_metadata
from dfkd_fast.recipe import recipe_from_toml
from tests.command_line import CommandResult, Run

TINY = [
    *("--set", "loop.epochs=3", "--set", "loop.iterations_per_epoch=2", "--set", "loop.batch_size=8", "--set", "loop.student_steps=2"),
    *("--set", "teacher.epochs=2", "--set", "generator.width=2", "--set", "report.samples=9", "--set", "report.samples_every=2"),
]


@pytest.fixture
def tiny_run(run: Run, tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    result = run("distill", "digits", "--out", folder, "--seed", "1", *TINY)
    assert result.code == 0, result.err
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_distill_leaves_everything_in_its_folder(tiny_run: Path) -> None:
    recipe = recipe_from_toml((tiny_run / "recipe.toml").read_text(), "recipe.toml")
    assert (recipe.seed, recipe.loop.epochs) == (1, 3)

    metrics = lines(tiny_run / "metrics.jsonl")
    assert [line["epoch"] for line in metrics] == [1, 2, 3]
    for line in metrics:
        assert set(line) == {
            "epoch",
            "seconds",
            "losses",
            "student_accuracy",
            "unaveraged_accuracy",
            "agreement",
            "drift",
            "relative_bn_moments",
        }
        assert set(line["losses"]) == {"student", "adversarial"}
        assert line["seconds"] > 0

    summary = json.loads((tiny_run / "summary.json").read_text())
    assert set(summary) >= {"recipe", "device", "versions", "seed", "teacher_accuracy", "student_accuracy", "seconds", "peak_memory_bytes"}
    assert set(summary["retention"]) >= {"last", "best", "mean", "variance", "largest_drop", "threshold", "fraction_retained"}
    assert (summary["recipe"], summary["device"], summary["seed"], summary["versions"]["dfkd_fast"]) == ("digits", "cpu", 1, __version__)
    accuracies = [line["student_accuracy"] for line in metrics]
    assert summary["student_accuracy"]["last"] == accuracies[-1]
    assert summary["student_accuracy"]["best"] == max(accuracies)
    assert summary["student_accuracy"]["mean"] == pytest.approx(sum(accuracies) / 3)
    assert set(summary["student_accuracy"]) >= {"last", "best", "mean", "variance"}
    seconds = summary["seconds"]
    assert seconds["total"] >= seconds["teacher"] + seconds["generator"] + seconds["student"] + seconds["evaluation"]
    assert min(seconds.values()) > 0
    assert summary["peak_memory_bytes"] > 50e6

    assert sorted(path.name for path in (tiny_run / "samples").iterdir()) == ["epoch-0001.png", "epoch-0002.png", "epoch-0003.png"]
    assert Image.open(tiny_run / "samples" / "epoch-0003.png").size == (3 * 33 + 1, 3 * 33 + 1)
    assert Image.open(tiny_run / "curves.png").size > (400, 400)
    assert list((tiny_run / "checkpoints").glob("iteration-*.pt"))
    assert list((tiny_run / "tensorboard").glob("events.*"))
    assert load_file(tiny_run / "student.safetensors").keys() == load_file(tiny_run / "teacher.safetensors").keys()


def test_evaluate_gives_the_accuracies_of_the_summary(run: Run, tiny_run: Path) -> None:
    result = run("evaluate", tiny_run, "--json", "figures.json")
    assert result.code == 0
    figures = {entry["role"]: entry for entry in json.loads(Path("figures.json").read_text())}
    summary = json.loads((tiny_run / "summary.json").read_text())
    assert figures["student"]["top1"] == pytest.approx(summary["student_accuracy"]["last"])
    assert figures["teacher"]["top1"] == pytest.approx(summary["teacher_accuracy"])
    assert figures["student"]["count"] == 450
    assert f"{figures['student']['top1']:.2f} %" in result.out


def test_evaluate_requires_the_network_of_foreign_weights_and_reads_its_own_metadata(run: Run, tiny_run: Path) -> None:
    torch.save(load_file(tiny_run / "teacher.safetensors"), "foreign.pt")
    result = run("evaluate", "foreign.pt")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "use --model and --data, or --recipe and --role" in result.err
    result = run("evaluate", "foreign.pt", tiny_run, "--recipe", "digits", "--role", "teacher", "--json", "f.json")
    assert result.code == 0, result.err
    foreign, student, teacher = json.loads(Path("f.json").read_text())
    assert (student["role"], teacher["role"]) == ("student", "teacher")
    assert foreign["top1"] == teacher["top1"]


def test_a_run_is_reproduced_by_its_own_recipe(run: Run, tiny_run: Path) -> None:
    assert run("distill", tiny_run / "recipe.toml", "--out", "again").code == 0
    assert Path("again/student.safetensors").read_bytes() == (tiny_run / "student.safetensors").read_bytes()


def test_a_trained_teacher_is_used_and_not_copied(run: Run, tiny_run: Path) -> None:
    assert run("distill", "digits", "--out", "copy", "--seed", "1", *TINY, "--teacher", tiny_run / "teacher.safetensors").code == 0
    assert not Path("copy/teacher.safetensors").exists()
    ours, theirs = (load_file(folder / "student.safetensors") for folder in (Path("copy"), tiny_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_teach_saves_a_teacher_that_distill_takes(run: Run) -> None:
    assert run("teach", "digits", "--out", "t", *TINY).code == 0
    assert run("evaluate", "t/teacher.safetensors").code == 0


def test_without_data_a_teacher_is_distilled_and_nothing_evaluated(run: Run, tiny_run: Path) -> None:
    result = run("distill", "digits", "--out", "blind", *TINY, "--set", "data.name=none", "--teacher", tiny_run / "teacher.safetensors")
    assert result.code == 0, result.err
    summary = json.loads(Path("blind/summary.json").read_text())
    assert (summary["teacher_accuracy"], summary["student_accuracy"]) == (None, None)
    assert all(line["student_accuracy"] is None for line in lines(Path("blind/metrics.jsonl")))


@pytest.mark.parametrize("iteration", [1, 4])
def test_resume_gives_the_same_student(run: Run, tiny_run: Path, monkeypatch: pytest.MonkeyPatch, iteration: int) -> None:
    iterate = Trainer.iterate

    def interrupted(trainer: Trainer) -> None:
        iterate(trainer)
        if trainer.iterations_done == iteration:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "iterate", interrupted)
    result = run("distill", "digits", "--out", "b", "--seed", "1", *TINY)
    assert result.code == 130
    assert result.err.startswith("dfkd-fast: interrupted and saved; resume with: dfkd-fast distill digits --out b --resume")
    assert result.err.count("\n") == 1
    assert not Path("b/student.safetensors").exists()

    monkeypatch.undo()
    monkeypatch.chdir(tiny_run.parent)
    assert run("distill", "digits", "--out", "b", "--resume").code == 0
    assert Path("b/student.safetensors").read_bytes() == (tiny_run / "student.safetensors").read_bytes()
    untimed = [[{**line, "seconds": 0} for line in lines(folder / "metrics.jsonl")] for folder in (Path("b"), tiny_run)]
    assert untimed[0] == untimed[1]


def test_ctrl_c_that_fails_the_step_under_way_is_an_interruption_all_the_same(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it reaches the C++ compiler, too, that torch.compile has started."""
    iterate = Trainer.iterate

    def interrupted(trainer: Trainer) -> None:
        if trainer.iterations_done == 3:
            signal.raise_signal(signal.SIGINT)
            raise RuntimeError("C++ compile error\nand pages of it")
        iterate(trainer)

    monkeypatch.setattr(Trainer, "iterate", interrupted)
    result = run("distill", "digits", "--out", "b", *TINY)
    assert result.code == 130
    assert result.err.startswith(
        "dfkd-fast: interrupted while a step failed: C++ compile error; the last good checkpoint is b/checkpoints/"
    )
    assert result.err.count("\n") == 1


def precisions_written(folder: Path) -> set[Any]:
    """In the recipe, the weights' headers, the summary and the checkpoints."""
    recipes = [(folder / "recipe.toml").read_text(), *(read_metadata(path)["recipe"] for path in folder.glob("*.safetensors"))]
    checkpoints = [torch.load(path, weights_only=True)["training"] for path in (folder / "checkpoints").glob("*.pt")]
    return {
        *(tomllib.loads(recipe)["engine"]["precision"] for recipe in recipes),
        *(training["precision"]["name"] for training in checkpoints),
        *(json.loads(path.read_text())["precision"] for path in folder.glob("summary.json")),
    }


def test_the_resolved_precision_is_saved(tiny_run: Path) -> None:
    assert precisions_written(tiny_run) == {"fp32"}


def test_a_run_keeps_the_precision_of_the_gpu_it_began_on(run: Run, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    iterate = Trainer.iterate

    def interrupted(trainer: Trainer) -> None:
        iterate(trainer)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "iterate", interrupted)
        patch.setattr("dfkd_fast.engine.method.resolve_precision", lambda setting, device: "bf16" if setting == "auto" else setting)
        assert run("distill", "digits", "--out", "b", *TINY).code == 130
    assert precisions_written(Path("b")) == {"bf16"}

    assert run("distill", "digits", "--out", "b", "--resume", "--set", "engine.precision=auto").code == 0
    assert precisions_written(Path("b")) == {"bf16"}
    result = run("distill", "digits", "--out", "b", "--resume", "--set", "engine.precision=fp32")
    assert result.code == 2
    assert "engine.precision is 'bf16'" in result.err


def test_a_finished_run_can_be_resumed_without_harm(run: Run, tiny_run: Path) -> None:
    before = (tiny_run / "student.safetensors").read_bytes()
    assert run("distill", "digits", "--out", tiny_run, "--resume").code == 0
    assert (tiny_run / "student.safetensors").read_bytes() == before
    assert len(lines(tiny_run / "metrics.jsonl")) == 3


def test_default_folders_are_numbered_and_never_overwritten(run: Run) -> None:
    for _ in range(2):
        assert run("teach", "digits", *TINY).code == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["digits", "digits-2"]


def test_ctrl_c_from_outside_saves_and_exits_with_130(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dfkd_fast", "distill", "digits", "--out", "run", *TINY, "--set", "loop.epochs=10000"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        while not list((tmp_path / "run" / "checkpoints").glob("iteration-*.pt")):
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert err.strip().splitlines()[-1].startswith("dfkd-fast: interrupted and saved")


LIMITED = """
import resource, sys
from dfkd_fast.cli import main
from dfkd_fast.report import folder
save, saved = folder.save_checkpoint, []
def limited(state, folder, iteration):
    if saved:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    saved.append(save(state, folder, iteration))
    return saved[-1]
folder.save_checkpoint = limited
main()
"""


def test_a_disk_that_fills_up_costs_one_line_and_no_checkpoint(tmp_path: Path, run: Run, tiny_run: Path) -> None:
    command = [
        sys.executable,
        "-c",
        LIMITED,
        "distill",
        "digits",
        "--out",
        "full",
        *TINY,
        "--teacher",
        str(tiny_run / "teacher.safetensors"),
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    assert "File too large" in result.stderr
    assert "the last good checkpoint is full/checkpoints/iteration-00000002.pt" in result.stderr
    assert [path.name for path in (tmp_path / "full" / "checkpoints").iterdir()] == ["iteration-00000002.pt"]
    assert run("distill", "digits", "--out", "full", "--resume").code == 0


def test_a_nan_stops_with_the_last_good_checkpoint_named(run: Run, tiny_run: Path) -> None:
    result = run(
        "distill", "digits", "--out", "nan", *TINY, "--teacher", tiny_run / "teacher.safetensors", "--set", "student_optimizer.lr=1e30"
    )
    assert result.code == 2
    assert "loss term" in result.err
    assert "epoch 1; there is no checkpoint yet" in result.err
    assert not list(Path("nan").rglob("*.pt"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "digit"], "unknown recipe 'digit': did you mean 'digits'?"),
        (["distill", "digits", "--set", "loop.epochs=0"], "loop.epochs = 0: must be a whole number ≥ 1"),
        (["distill", "digits", "--set", "loop.epochs"], "--set 'loop.epochs': must be key.path=value"),
        (["distill", "digits", "--set", "student.model=lenet5_haf"], "did you mean 'lenet5_half'?"),
        (
            ["distill", "digits", "--set", "generator.model=B", "--set", "data.image_size=40"],
            "image_size of 16, 32, 64, 128 or 256, not 40",
        ),
        (["distill", "digits", "--set", "data.image_size=36"], "data.image_size's 1×36×36 images"),
        (["distill", "digits", "--teacher", "nowhere.safetensors"], "nowhere.safetensors not found"),
        (["distill", "digits", "--device", "tpu"], "tpu"),
        (["distill", "digits", "--out", "missing", "--resume"], "--resume: missing holds no run"),
        (["distill", "mnist-dfad"], "data.root (--data-root) = '': data set 'mnist' needs the folder that holds it"),
        (["distill", "mnist-cpu", "--data-root", "nowhere"], "nowhere does not exist"),
        (["distill", "mnist-cpu", "--data-root", "."], "does not hold MNIST in torchvision's layout"),
        (["distill", "digits", "--set", "data.name=none"], "this recipe has no images"),
        (["distill"], "Missing argument"),
        (["distill", "digits", "--set", "student_optimizer.kind=apex_sgd"], "needs NVIDIA's apex"),
        (["distill", "digits", "--auto-batch-size"], "--auto-batch-size: needs a GPU, and the device is 'cpu'"),
        (["evaluate", "nowhere"], "weights nowhere not found"),
        (["evaluate", "."], "holds neither student.safetensors nor teacher.safetensors"),
        (["show", "nothing.toml"], "cannot be read"),
        (["frobnicate"], "No such command"),
    ],
)
def test_what_a_user_can_fix_is_one_line_and_exit_code_2(run: Run, arguments: list[str], message: str) -> None:
    tiny = TINY if arguments[:1] == ["distill"] and len(arguments) > 1 else []
    result = run(*arguments[:2], *tiny, *arguments[2:])
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["distill", "digits", "--teacher", "package", "--weights-key", "a"],
            "teacher.weights_key (--weights-key) = 'a': must be empty for teacher.weights (--teacher) = 'package'",
        ),
        (
            ["doctor", "--teacher", "digits", "--weights", "package", "--weights-key", "a"],
            "teacher.weights_key (--weights-key) = 'a': must be empty for teacher.weights (--weights) = 'package'",
        ),
        (["teach", "digits", "--device", "cuda"], "no GPU is available to PyTorch; use 'cpu' (--device cpu), or run dfkd-fast doctor"),
        (["show", "digits", "--set", "data.strict=2"], "recipe 'digits': data.strict = 2: must be true or false\n"),
        (["evaluate", "--recipe", "digits", "--set", "data.strict=2"], "recipe 'digits': data.strict = 2: must be true or false\n"),
        (["distill", "digits", "--set", "data.rot=2"], "did you mean 'data.root'? must be one of data.batch_size, "),
        (["distill", "digits", "--set", "data.rot=2"], ", data.resize, data.root, data.std, "),
        (["distill", "digits", "--set", "teacher.key=2"], ", teacher.weights, teacher.weights_key\n"),
    ],
)
def test_an_error_names_a_field_and_the_option_that_sets_it_in_this_command(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run(*arguments)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert message in result.err


def test_a_run_in_a_taken_folder_is_refused_and_nothing_lost(run: Run, tiny_run: Path) -> None:
    before = (tiny_run / "recipe.toml").read_bytes()
    result = run("distill", "digits", "--out", tiny_run)
    assert result.code == 2
    assert "already exists" in result.err
    assert (tiny_run / "recipe.toml").read_bytes() == before


def test_what_fails_before_it_begins_leaves_no_folder_behind(run: Run) -> None:
    apex = ["--set", "generator_optimizer.kind=apex_adam"]
    for wrong in (["--teacher", "nowhere"], ["--set", "student.model=nothing"], ["--set", "data.image_size=36"], apex):
        assert run("distill", "digits", "--out", "mine", *TINY, *wrong).code == 2
        assert not Path("mine").exists()


def test_resume_refuses_another_recipe_and_changed_numbers(run: Run, tiny_run: Path) -> None:
    assert "holds a run of recipe 'digits', not 'digits-dfad'" in run("distill", "digits-dfad", "--out", tiny_run, "--resume").err
    result = run("distill", "digits", "--out", tiny_run, "--resume", "--set", "loop.batch_size=9")
    assert result.code == 2
    assert "loop.batch_size is 8" in result.err
    assert run("distill", "digits", "--out", tiny_run, "--resume", "--set", "report.samples=4").code == 0


def test_recipes_lists_and_show_prints_what_is_shipped(run: Run) -> None:
    listed = run("recipes").out
    assert all(name in listed for name in ("digits", "digits-dfad", "mnist-dfad", "mnist-mad", "mnist-cpu"))
    shown = run("show", "digits", "--set", "loop.epochs=7").out
    assert tomllib.loads(shown)["loop"]["epochs"] == 7


def test_doctor_names_everything_optional(run: Run) -> None:
    result = run("doctor")
    assert result.code == 0
    for thing in ("GPU", "Triton", "compiled extension", "numba", "DALI", "apex"):
        assert thing in result.out
    for operation in ("ema_update_", "l1_discrepancy", "kl_discrepancy", "js_discrepancy", "concat_generated", "channel_moments"):
        assert operation in result.out


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("fast", "DFKD_FAST_BACKEND must be one of reference, numba, triton, cuda, not 'fast'"),
        ("triton", "device 'cpu': not supported by the forced kernel backend 'triton'"),
    ],
)
def test_forced_backend_that_cannot_serve_is_reported_before_anything_begins(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, message: str
) -> None:
    monkeypatch.setattr("dfkd_fast.kernels.dispatch._context", ContextVar("backend", default=backend))
    result = run("distill", "digits", "--device", "cpu", "--out", str(tmp_path / "run"))
    assert result.code == 2
    assert message in result.err
    assert not (tmp_path / "run").exists()


def test_build_says_in_one_line_why_it_cannot(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFKD_FAST_BUILD", "0")
    assert run("build") == CommandResult(2, "", "dfkd-fast: DFKD_FAST_BUILD is 0\n")


def test_the_old_name_of_an_option_works_with_a_warning(run: Run) -> None:
    result = run("distill", "digits", "--fit", "--device", "cpu")
    assert result.code == 2
    assert result.err.splitlines() == [
        "dfkd-fast: --fit is now called --auto-batch-size",
        "dfkd-fast: --auto-batch-size: needs a GPU, and the device is 'cpu'",
    ]
