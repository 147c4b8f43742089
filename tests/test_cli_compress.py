"""``dfkd-fast compress``: from a network to a quantized copy in one command."""

import importlib.util
import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from dfkd_fast.cli import main
from dfkd_fast.commands.compress import CompressRequest, compression_overrides, parse_bits
from dfkd_fast.commands.networks import build_network
from dfkd_fast.commands.quantized import float_layers
from dfkd_fast.errors import DfkdError
from dfkd_fast.models import LeNet5, load_weights, save_weights
from dfkd_fast.recipe import load_recipe
from dfkd_fast.surgery import quantized_layers
from tests.command_line import Run

TINY = [
    *("--set", "loop.iterations_per_epoch=1", "--set", "loop.batch_size=8", "--set", "generator.width=2"),
    *("--set", "loop.generator_pretraining=2", "--set", "report.samples=4", "--set", "teacher.epochs=2"),
]
TWO_EPOCHS = ["--set", "loop.epochs=2"]
NETWORKS = """
from torch import nn


def flat(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes))


def none(num_classes):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(nn.init.ones_(nn.Parameter(__import__("torch").empty(num_classes))))

        def forward(self, x):
            return x.mean((1, 2, 3))[:, None] * self.gain

    return Scale()


def mixed(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, num_classes),
    )
"""
OF_USER = [
    *(
        "--set",
        "data.num_classes=10",
        "--set",
        "data.image_size=16",
        "--set",
        "data.mean=[0.5, 0.5, 0.5]",
        "--set",
        "data.std=[0.2, 0.2, 0.2]",
    ),
]


class Compressed(NamedTuple):
    """A finished compression of the digits' teacher."""

    folder: Path
    out: str


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    folder = tmp_path_factory.mktemp("compressed") / "run"
    arguments = ["dfkd-fast", "compress", "digits", *TINY, *TWO_EPOCHS, "--out", str(folder)]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", arguments)
        patch.setenv("COLUMNS", "200")
        main()
    assert not ended.value.code, out.getvalue()
    return Compressed(folder, out.getvalue())


@pytest.fixture
def user_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_networks.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_networks"


def imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("rebuilt", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weights_of(network: str, tmp_path: Path, image: int = 16) -> Path:
    recipe = load_recipe("digits", {"teacher.model": network, "data.channels": 3, "data.mean": [0.5] * 3, "data.std": [0.5] * 3})
    save_weights(build_network(recipe, "teacher"), path := tmp_path / f"{network.replace(':', '-')}.safetensors", {})
    return path


def test_the_python_file_rebuilds_the_students_network(compressed: Compressed) -> None:
    folder = compressed.folder
    student = build_network(load_recipe(str(folder / "recipe.toml")), "student")
    load_weights(student, folder / "student.safetensors")
    images = torch.randn(4, 1, 32, 32)
    assert torch.equal(imported(folder / "quantized.py").build()(images), student.eval()(images))


def test_the_summary_and_the_table_have_size_and_results_before_and_after(compressed: Compressed) -> None:
    folder = compressed.folder
    summary = json.loads((folder / "summary.json").read_text())
    quantized = summary["quantized"]
    assert quantized["bytes"] == (folder / "quantized.safetensors").stat().st_size < quantized["teacher_bytes"] / 4
    assert quantized["bits"] == "w4a8"
    assert 0 <= quantized["calibrated_accuracy"] <= 100 and 0 <= quantized["calibrated_agreement"] <= 100
    assert summary["agreement"]["samples"] == 1000 and summary["student_accuracy"] is not None
    calibration = json.loads((folder / "calibration.json").read_text())
    assert 0 < summary["seconds"]["calibration"] < calibration["seconds"]  # with the generator's pretraining
    report = (folder / "report.html").read_text()
    assert "Student, calibrated, before the first step" in report and "Calibration of the quantized student" in report
    for text in ("digits-w4a8", "times smaller (w4a8)", "student, only calibrated", "quantized.py"):
        assert text in compressed.out


def test_first_and_last_layer_have_8_bits_and_the_others_those_of_the_option(compressed: Compressed) -> None:
    layers = quantized_layers(imported(compressed.folder / "quantized.py").build())
    assert [layer.weight_bits for layer in layers.values()] == [8, 4, 4, 4, 8]
    assert {layer.activation_bits for layer in layers.values()} == {8}


def test_a_finished_compression_is_resumed_by_its_own_command(compressed: Compressed, run: Run) -> None:
    before = (compressed.folder / "quantized.safetensors").read_bytes()
    for network in (str(compressed.folder / "recipe.toml"), "digits"):
        again = run("compress", network, *(TINY if network == "digits" else ()), "--out", str(compressed.folder), "--resume")
        assert again.code == 0, again.err
    assert (compressed.folder / "quantized.safetensors").read_bytes() == before


def test_evaluate_reads_the_student_of_a_compression(compressed: Compressed, run: Run) -> None:
    result = run("evaluate", str(compressed.folder))
    assert result.code == 0, result.err
    last = json.loads((compressed.folder / "summary.json").read_text())["student_accuracy"]["last"]
    assert f"{last:.2f} %" in result.out


def test_evaluate_names_the_folder_instead_of_the_file_with_integers(compressed: Compressed, run: Run) -> None:
    result = run("evaluate", str(compressed.folder / "quantized.safetensors"))
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert "quantized.safetensors holds the integers of a quantized network: evaluate its run's folder" in line


def test_a_shipped_teacher_brings_its_input_and_needs_no_data(run: Run, tmp_path: Path) -> None:
    result = run(
        "compress", "lenet5", "--weights", "shipped:mnist-lenet5", "--bits", "w8a8", *TINY, *TWO_EPOCHS, "--out", str(tmp_path / "r")
    )
    assert result.code == 0, result.err
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["recipe"] == "lenet5-w8a8" and summary["student_accuracy"] is None
    assert summary["quantized"]["calibrated_accuracy"] is None and summary["agreement"] is not None
    assert "without batch norm statistics" in result.out + result.err  # one line says what is missing
    assert "check of the network" in result.out


def test_layers_that_cannot_be_quantized_are_named(user_network: str) -> None:
    networks = {f"{role}.model": f"{user_network}:mixed" for role in ("teacher", "student")}
    bits = {"student.init": "teacher", "student.weight_bits": 4, "data.channels": 3, "data.mean": [0.5] * 3, "data.std": [0.5] * 3}
    recipe = load_recipe("digits", networks | bits)
    assert float_layers(recipe, build_network(recipe, "student")) == "student.weight_bits = 4: left in float: 3"
    only_activations = load_recipe("digits", networks | bits | {"student.weight_bits": 32, "student.activation_bits": 8})
    assert float_layers(only_activations, build_network(only_activations, "student")) is None


@pytest.mark.parametrize("text", ["w5a8", "a8", "w32a32", "w32", "w4a8 ", "W4A8", "8", "w4a3", "", "w4a"])
def test_bits_outside_what_is_allowed_are_one_line(text: str) -> None:
    with pytest.raises(DfkdError, match=r"^--bits '.*': must be wXaY[^\n]*$"):
        parse_bits(text)


@pytest.mark.parametrize(("text", "bits"), [("w4a8", (4, 8)), ("w3", (3, 32)), ("w32a8", (32, 8)), ("w8a4", (8, 4))])
def test_bits_of_weights_and_activations(text: str, bits: tuple[int, int]) -> None:
    assert parse_bits(text) == bits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lenet6"], "model 'lenet6'"),
        (["lenet5"], "lenet5: name its weights with --weights FILE"),
        (["lenet5", "--weights", "absent.pth"], "absent.pth not found"),
        (["lenet5", "--weights", "shipped:mnist-lenet5", "--data", "nosuch"], "data set 'nosuch'"),
        (["lenet5", "--weights", "shipped:mnist-lenet5", "--data", "mnist"], "--data mnist: requires --data-root"),
        (["lenet6", "--weights", "shipped:mnist-lenet5"], "model 'lenet6'"),
        (["wrn16_1", "--weights", "shipped:mnist-lenet5"], "teacher.model = 'wrn16_1'"),
        (["efficientnet_lite0", "--weights", "missing.pth"], "missing.pth"),
        (["digits", "--bits", "w2a8"], "--bits 'w2a8': must be wXaY"),
        (["digits", "--budget", "soon"], "soon"),
        (["digits", "--budget", "1min", "--set", "loop.epochs=2"], "loop.epochs"),
        (["digits", "--set", "student.model=lenet5_half"], "student.model = 'lenet5_half'"),
        (["digits", "--set", "student.weight_bits=3"], "--set student.weight_bits=3: must be named by --bits wXaY"),
        (["imagenet-lite-w4a8", "--set", "student.activation_bits=4"], "--set student.activation_bits=4: must be named by --bits wXaY"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_folder(arguments: list[str], message: str, run: Run, tmp_path: Path) -> None:
    result = run("compress", *arguments, "--out", str(tmp_path / "run"))
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_network_without_convolution_or_linear_layer_is_one_line(run: Run, user_network: str, tmp_path: Path) -> None:
    weights = weights_of(f"{user_network}:none", tmp_path)
    result = run("compress", f"{user_network}:none", "--weights", str(weights), *OF_USER, *TINY, "--out", str(tmp_path / "r"))
    assert result.code == 2 and "no convolution or linear layer" in result.err and result.err.count("\n") == 1


def test_a_folder_with_another_run_is_not_overwritten(compressed: Compressed, run: Run) -> None:
    before = (compressed.folder / "recipe.toml").read_bytes()
    result = run("compress", "digits", "--bits", "w8a8", *TINY, *TWO_EPOCHS, "--out", str(compressed.folder))
    assert result.code == 2 and str(compressed.folder) in result.err
    assert (compressed.folder / "recipe.toml").read_bytes() == before


def test_terms_that_a_network_cannot_have_are_left_out() -> None:
    _, of_lenet = compression_overrides(CompressRequest("digits"))
    assert of_lenet["objective.bn_moments"] == 0 and of_lenet["generator.model"] == "C"
    _, of_segmenter = compression_overrides(CompressRequest("camvid-cpu"))
    assert of_segmenter["objective.class_nll"] == 0 and not of_segmenter["generator.conditional"]
    recipe = load_recipe("camvid-cpu", of_segmenter)
    assert recipe.student.is_quantized and recipe.student.model == recipe.teacher.model


def test_a_segmenter_without_batch_norms_has_an_adversary_to_train_its_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfkd_fast.commands.compress.has_running_statistics", lambda layer: False)
    recipe = load_recipe(*compression_overrides(CompressRequest("camvid-cpu")))
    assert (recipe.loop.generator_pretraining, recipe.loop.generator_steps) == (0, 1)
    assert recipe.objective.adversarial == 1


@pytest.mark.parametrize(("bits", "rate"), [("w3", 1e-3), ("w3a8", 1e-3), ("w4a8", 5e-4), ("w8a4", 5e-4), ("w8a8", 3e-5), ("w32a8", 3e-5)])
def test_the_rate_fits_the_smaller_number_of_bits_unless_it_is_given(bits: str, rate: float) -> None:
    _, overrides = compression_overrides(CompressRequest("digits", bits))
    assert overrides["student_optimizer.lr"] == rate
    for network in ("digits", "imagenet-lite-w4a8"):
        _, overrides = compression_overrides(CompressRequest(network, bits, overrides={"student_optimizer.lr": 0.5}))
        assert overrides["student_optimizer.lr"] == 0.5


def test_images_are_generated_smaller_where_the_network_accepts_them(tmp_path: Path) -> None:
    _, of_convolutions = compression_overrides(CompressRequest("efficientnet_lite0"))
    assert of_convolutions["generator.image_size"] == 128 and of_convolutions["data.image_size"] == 224
    (tmp_path / "vit.pth").touch()
    weights = {"teacher.weights": str(tmp_path / "vit.pth")}
    _, of_vit = compression_overrides(CompressRequest("timm:vit_tiny_patch16_224", overrides=weights))
    assert of_vit["generator.image_size"] == 0


def test_the_networks_input_is_that_of_its_library() -> None:
    name, overrides = compression_overrides(CompressRequest("efficientnet_lite0", bits="w8a8"))
    data = load_recipe(name, overrides).data
    assert (data.num_classes, data.channels, data.image_size, data.resize, data.interpolation) == (1000, 3, 224, 256, "bicubic")
    assert data.mean == pytest.approx((0.498,) * 3, abs=1e-4) and data.name == "none"


def test_a_saved_network_of_another_size_does_not_fit(run: Run, tmp_path: Path) -> None:
    save_weights(LeNet5(widths=(3, 8, 60, 42)), tmp_path / "half.safetensors", {})
    result = run("compress", "digits", "--weights", str(tmp_path / "half.safetensors"), *TINY, *TWO_EPOCHS, "--out", str(tmp_path / "r"))
    assert result.code == 2 and "do not fit the network" in result.err and result.err.count("\n") == 1


def test_the_report_has_the_sizes(compressed: Compressed) -> None:
    page = (compressed.folder / "report.html").read_text()
    quantized = json.loads((compressed.folder / "summary.json").read_text())["quantized"]
    assert f"<span>Size, w4a8</span><b>{quantized['bytes'] / 1e6:.2f} MB</b>" in page
