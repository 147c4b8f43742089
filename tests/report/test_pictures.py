from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dfkd_fast import Epoch
from dfkd_fast.report.pictures import draw_curves, draw_samples


def test_samples_are_taken_back_from_the_normalised_space(tmp_path: Path) -> None:
    mean, std = (0.2, 0.4, 0.6), (0.1, 0.2, 0.3)
    grey = torch.zeros(4, 3, 5, 5)
    grey[1] = 2.0
    draw_samples(grey, mean, std, tmp_path / "grid.png")
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (13, 13, 3)
    assert np.allclose(pixels[2, 2] / 255, mean, atol=0.01)
    assert np.allclose(pixels[2, 9] / 255, [0.4, 0.8, 1.0], atol=0.01)


def test_curves_are_drawn_with_and_without_accuracies(tmp_path: Path) -> None:
    epochs = [Epoch(number, 1.0, {"student": 1.0 / number, "adversarial": -1.0}, 90.0 + number) for number in (1, 2, 3)]
    draw_curves(epochs, 98.0, "with data", tmp_path / "with.png")
    draw_curves([Epoch(1, 1.0, {"student": 1.0}, None)], None, "without", tmp_path / "without.png")
    draw_curves([], 98.0, "not begun", tmp_path / "teacher.png")
    ours, theirs, teachers = (Image.open(tmp_path / name).size for name in ("with.png", "without.png", "teacher.png"))
    assert ours == teachers
    assert theirs[1] < 0.7 * ours[1]  # no empty panel
