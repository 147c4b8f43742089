"""``python -m bench calibration``: quantized copies of a network before any training."""

import copy
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import calibration
from bench.baselines import pt2e
from bench.provenance import commit
from bench.report.calibration import calibration_table, peer_table
from dfkd_fast import DfkdError, Recipe, load_recipe
from dfkd_fast.commands.networks import build_network
from dfkd_fast.models import save_weights
from dfkd_fast.surgery import eval_mode, quantize

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """WRN-10-1 with random weights on the digits, and a generator that is hardly pretrained."""
    changes = {"teacher.model": "wrn10_1", "loop.batch_size": 8, "loop.generator_pretraining": 2, "objective.bn_moments": 1.0}
    return with_weights(changes | {"generator.width": 4, "data.subset": 40}, tmp_path_factory.mktemp("teacher"))


def with_weights(changes: Mapping[str, object], folder: Path) -> Recipe:
    """The recipe digits with random weights of its teacher."""
    path = folder / "teacher.safetensors"
    save_weights(build_network(load_recipe("digits", changes), "teacher"), path, {})
    return load_recipe("digits", {**changes, "teacher.weights": str(path)})


def test_rows_name_correction_and_images_and_have_both_percentages(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "CALIBRATION_SAMPLES", 24)
    monkeypatch.setattr(calibration, "version", lambda package: "")  # a peer that is not installed
    lines: list[str] = []
    rows = list(calibration.measure(recipe, ["w4a8", "w8"], CPU, "a command", lines.append))
    assert [line for line in lines if "torchao" in line] == ["PT2E: left out, because torchao is not installed: pip install torchao"]
    corrected = [(correction, images) for images in ("generated", "noise", "real") for correction in ("batch norms", "calibrate")]
    assert [(row.bits, row.correction, row.images) for row in rows] == [
        (bits, *source) for bits in ("w4a8", "w8") for source in (("none", "generated"), *corrected)
    ]
    for row in rows:
        assert 0 <= row.accuracy <= 100 and 0 <= row.agreement <= 100 and row.evaluated == 40
        assert (row.network, row.samples, row.pretraining, row.provenance.commit) == ("wrn10_1", 24, 2, commit())
    assert rows[-1].agreement >= 90  # 8 bits, calibrated on real images


def test_a_peer_that_cannot_quantize_any_of_the_bits_is_one_line(recipe: Recipe) -> None:
    with pytest.raises(DfkdError, match=r"^nothing to measure: PT2E needs torchao, and activations of 8 bits, not w4, w8a4$"):
        list(calibration.measure(recipe, ["w4", "w8a4"], CPU, "a command", lambda line: None, ["PT2E"]))


def test_pytorchs_quantization_has_rows_for_activations_of_8_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setattr(calibration, "CALIBRATION_SAMPLES", 24)
    changes = {"loop.batch_size": 8, "loop.generator_pretraining": 0, "generator.width": 4, "data.subset": 40}
    small = with_weights(changes, tmp_path)
    rows = list(calibration.measure(small, ["w8a8", "w8", "w4a4"], CPU, "a command", lambda line: None, ["PT2E"]))
    assert [(row.bits, row.correction, row.images) for row in rows] == [
        ("w8a8", "PT2E", images) for images in ("generated", "noise", "real")
    ]
    assert rows[-1].agreement >= 90 and rows[-1].provenance.torchao


def test_pytorchs_quantization_has_the_bits_of_each_layer_and_the_ranges_of_its_images() -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    network = nn.Sequential(*layers).eval()
    images, evaluated = torch.rand(20, 1, 8, 8), torch.rand(5, 1, 12, 12)
    expected = network(evaluated)
    quantized = pt2e.quantized(network, images, evaluated, {"0": 8, "3": 4, "6": 8})
    integers = [buffer for _, buffer in quantized.named_buffers() if buffer.dtype == torch.int8]
    assert [int(weights.max()) for weights in integers] == [127, 7, 127]
    with eval_mode(quantized):
        error, of_brighter = ((quantized(scale * evaluated) - network(scale * evaluated)).abs().max() for scale in (1, 3))
    assert 0 < error < 0.05 * expected.abs().max() and of_brighter > 4 * error  # which are cut off
    assert torch.equal(network(evaluated), expected)


def test_the_peer_has_a_table_of_its_own_beside_the_same_images() -> None:
    common = {"network": "lenet5", "teacher_accuracy": "98.0", "pretraining": "300", "seed": "0", "device": "a CPU", "agreement": "99.0"}
    rows = [
        common | {"bits": bits, "correction": correction, "images": "real", "accuracy": accuracy, "torchao": "1.0"}
        for bits, correction, accuracy in (("w8a8", "calibrate", "97.0"), ("w8a8", "PT2E", "96.0"), ("w4", "calibrate", "95.0"))
    ]
    assert peer_table(rows).splitlines()[2:] == ["| `lenet5` | 98.0 | w8a8 | real | 96.0 (99.0) | 97.0 (99.0) | 300 | 0 | 1.0 | a CPU |"]
    assert "96.0" not in calibration_table(rows) and len(calibration_table(rows).splitlines()) == 4


def test_statistics_that_are_estimated_again_are_those_of_the_images(recipe: Recipe) -> None:
    teacher = build_network(recipe, "teacher").eval()
    student, images = copy.deepcopy(teacher), torch.randn(16, 1, 32, 32)
    quantize(student, images, weight_bits=4, activation_bits=32)
    with torch.no_grad():
        calibration._estimate_again(student, teacher, images)
    norm = student.get_submodule("features.1.activate.0")
    with eval_mode(student):
        inputs = student.get_submodule("features.0")(images)
        assert torch.allclose(norm.running_mean, inputs.mean((0, 2, 3)), atol=1e-5)  # type: ignore[arg-type]
        assert torch.allclose(norm.running_var, inputs.var((0, 2, 3)), atol=1e-5)  # type: ignore[arg-type]
    assert not any(layer._forward_pre_hooks for layer in student.modules())


def test_a_network_without_weights_is_one_line() -> None:
    with pytest.raises(DfkdError, match=r"teacher\.weights: not set"):
        next(calibration.measure(load_recipe("digits"), ["w4a8"], CPU, "a command", lambda line: None))


def test_bits_that_are_not_allowed_are_one_line(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(DfkdError, match="--bits 'w5'"):
        next(calibration.measure(recipe, ["w5"], CPU, "a command", lambda line: None))
