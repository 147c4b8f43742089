"""``python -m bench calibration``: quantized copies of a network before any training."""

import copy
from pathlib import Path

import pytest
import torch

from bench import calibration
from bench.provenance import commit
from dfkd_fast import DfkdError, Recipe, load_recipe
from dfkd_fast.commands.networks import build_network
from dfkd_fast.models import save_weights
from dfkd_fast.surgery import eval_mode, quantize

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """WRN-10-1 with random weights on the digits, and a generator that is hardly pretrained."""
    changes = {"teacher.model": "wrn10_1", "loop.batch_size": 8, "loop.generator_pretraining": 2, "objective.bn_moments": 1.0}
    small = load_recipe("digits", changes | {"generator.width": 4, "data.subset": 40})
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_weights(build_network(small, "teacher"), path, {})
    return load_recipe("digits", changes | {"generator.width": 4, "data.subset": 40, "teacher.weights": str(path)})


def test_rows_name_correction_and_images_and_have_both_percentages(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "CALIBRATION_SAMPLES", 24)
    rows = list(calibration.measure(recipe, ["w4a8", "w8"], CPU, "a command", lambda line: None))
    corrected = [(correction, images) for images in ("generated", "noise", "real") for correction in ("batch norms", "calibrate")]
    assert [(row.bits, row.correction, row.images) for row in rows] == [
        (bits, *source) for bits in ("w4a8", "w8") for source in (("none", "generated"), *corrected)
    ]
    for row in rows:
        assert 0 <= row.accuracy <= 100 and 0 <= row.agreement <= 100 and row.evaluated == 40
        assert (row.network, row.samples, row.pretraining, row.provenance.commit) == ("wrn10_1", 24, 2, commit())
    assert rows[-1].agreement >= 90  # 8 bits, calibrated on real images


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
