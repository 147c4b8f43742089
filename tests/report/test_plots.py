import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from dfkd_fast import Epoch
from dfkd_fast.report.plots import curves_as_svg, plot_curves, plot_samples_over_time, read_samples, save_samples, spread


def test_samples_are_denormalised(tmp_path: Path) -> None:
    mean, std = (0.2, 0.4, 0.6), (0.1, 0.2, 0.3)
    grey = torch.zeros(4, 3, 5, 5)
    grey[1] = 2.0
    save_samples(grey, mean, std, tmp_path / "grid.png")
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (13, 13, 3)
    assert np.allclose(pixels[2, 2] / 255, mean, atol=0.01)
    assert np.allclose(pixels[2, 9] / 255, [0.4, 0.8, 1.0], atol=0.01)


def test_curves_are_plotted_with_and_without_accuracies(tmp_path: Path) -> None:
    epochs = [Epoch(number, 1.0, {"student": 1.0 / number, "adversarial": -1.0}, 90.0 + number) for number in (1, 2, 3)]
    plot_curves(epochs, 98.0, "with data", tmp_path / "with.png")
    plot_curves([Epoch(1, 1.0, {"student": 1.0}, None)], None, "without", tmp_path / "without.png")
    plot_curves([], 98.0, "not started", tmp_path / "teacher.png")
    full, losses_only, accuracy_only = (Image.open(tmp_path / name).size for name in ("with.png", "without.png", "teacher.png"))
    assert max(losses_only[1], accuracy_only[1]) < 0.7 * full[1]  # no empty panel


def test_every_loss_term_has_axes_of_its_own_so_that_a_small_one_is_legible_beside_a_large_one() -> None:
    epochs = [Epoch(number, 1.0, {"student": 0.5 / number, "bn_moments": 50.0 + number}, None) for number in (1, 2, 3)]
    student, moments = curves_as_svg(epochs, None, "top-1 accuracy")
    assert "Student loss" in student
    assert "Generator loss: bn_moments" in moments
    heights = [
        [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", svg.split('id="line2d_')[-1].split("</g>")[0])] for svg in (student, moments)
    ]
    assert all(max(ys) - min(ys) > 100 for ys in heights)  # of 200: each curve spans its axes


def test_the_curve_of_bn_moments_states_the_relative_value_of_the_last_epoch() -> None:
    epochs = [Epoch(number, 1.0, {"student": 0.5, "bn_moments": 5.0}, None, relative_bn_moments=0.12345 * number) for number in (1, 2)]
    student, moments = curves_as_svg(epochs, None, "top-1 accuracy")
    assert "Generator loss: bn_moments" in moments and "(0.25 relative)" in moments
    assert "relative" not in student


@pytest.mark.parametrize("terms", [["student", "adversarial", "one_hot", "bn_moments"], ["student", "adversarial", "bn_moments"]])
def test_a_long_title_at_the_right_is_not_cut_off(tmp_path: Path, terms: list[str]) -> None:
    epochs = [Epoch(1, 1.0, dict.fromkeys(terms, 0.5), 90.0, relative_bn_moments=0.05732)]
    plot_curves(epochs, 98.0, "title", tmp_path / "curves.png")
    margin = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"))[:, -1]
    assert (margin == margin[0]).all()


def test_a_quantized_student_before_its_first_step_is_drawn_as_epoch_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr("dfkd_fast.report.plots.save_figure", lambda figure, path: figures.append(figure))
    epochs = [Epoch(1, 1.0, {}, None), Epoch(2, 1.0, {}, 80.0)]
    plot_curves(epochs, 90.0, "quantized", tmp_path / "curves.png", calibrated=60.0)
    assert np.array_equal(figures[0].axes[0].lines[0].get_xydata(), [(0, 60.0), (2, 80.0)])


def test_the_only_epoch_of_a_short_run_is_the_only_tick() -> None:
    (svg,) = curves_as_svg([Epoch(1, 1.0, {}, 98.0)], None, "mIoU")
    ticks = svg.split('id="matplotlib.axis_1"')[1].split('id="matplotlib.axis_2"')[0]
    assert re.findall(r">([\d.]+)</text>", ticks) == ["1"]


def test_the_legend_does_not_cover_the_curves() -> None:
    epochs = [Epoch(number, 1.0, {}, 98.0) for number in (1, 2, 3)]
    (svg,) = curves_as_svg(epochs, 98.5, "mIoU")
    assert "teacher (98.50 %)" in svg
    legend, axes = svg.split('id="legend_1"')[1].split("<clipPath")[0], svg.split('id="patch_2"')[1]
    lowest_text = max(float(y) for y in re.findall(r'y="([\d.]+)"', legend))
    top_of_axes = min(float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", axes.split("</g>")[0]))
    assert lowest_text < top_of_axes


def test_inline_svg_is_repeatable_and_has_the_text_colour_of_its_page() -> None:
    epochs = [Epoch(number, 1.0, {"student": 1.0 / number}, 90.0) for number in (1, 2)]
    first, again = (curves_as_svg(epochs, 98.0, "top-1 accuracy") for _ in range(2))
    assert first == again
    assert all(svg.startswith("<svg") and "currentColor" in svg and "#000000" not in svg for svg in first)


@pytest.mark.parametrize(("count", "label_maps"), [(1, 0), (1, 2), (9, 0), (12, 2)])
def test_samples_are_read_back_from_their_grid(tmp_path: Path, count: int, label_maps: int) -> None:
    values = torch.arange(1, count * (1 + label_maps) + 1).reshape(count, 1 + label_maps) / 64
    pixels = values[..., None, None, None].expand(-1, -1, 3, 8, 8)
    maps = [(pixels[:, index] * 255).round().byte() for index in range(1, 1 + label_maps)]
    save_samples(pixels[:, 0], (0.0,) * 3, (1.0,) * 3, tmp_path / "grid.png", maps)
    for requested in (1, count, 100):
        samples = read_samples(tmp_path / "grid.png", 8, label_maps, requested)
        read = torch.tensor([[np.asarray(image).mean() / 255 for image in sample] for sample in samples])
        assert len(samples) >= min(requested, count)
        assert torch.allclose(read[:count], values[: len(samples)].double(), atol=0.005)
        assert all(np.asarray(image).std() == 0 and image.size == (8, 8) for sample in samples[:count] for image in sample)


def test_epochs_of_the_strip_are_evenly_spaced_and_include_the_first_and_the_last() -> None:
    assert spread([1, 2, 3], 8) == [1, 2, 3]
    assert spread(range(1, 101), 4) == [1, 34, 67, 100]


def test_samples_over_time_have_a_dark_background(tmp_path: Path) -> None:
    white = Image.new("RGB", (8, 8), "white")
    plot_samples_over_time([("epoch 1", [white, white]), ("epoch 2", [white, white])], ["teacher", "student"], tmp_path / "strip.png")
    pixels = np.asarray(Image.open(tmp_path / "strip.png").convert("L"))
    assert pixels[0, 0] < 40
    assert (pixels > 250).mean() > 0.5


def test_the_axis_names_the_accuracy_where_the_agreement_is_measured_too() -> None:
    accuracy = curves_as_svg([Epoch(1, 1.0, {}, 98.0, agreement=70.0)], 99.0, "top-1 accuracy")[0]
    assert "accuracy" in accuracy.lower() and "98.00" in accuracy and "generated samples" not in accuracy
    agreement = curves_as_svg([Epoch(1, 1.0, {}, None, agreement=70.0)], None, "top-1 accuracy")[0]
    assert "generated samples" in agreement and "70.00" in agreement
