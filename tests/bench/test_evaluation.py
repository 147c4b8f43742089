import importlib.util
from pathlib import Path

import pytest
import torch

from bench import evaluation
from dfkd_fast.data import ImageList, list_test_images
from dfkd_fast.errors import DfkdError
from tests.image_files import jpeg, noise

HAS_DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="nvidia-dali is not installed")


@pytest.fixture
def listing(tmp_path: Path) -> ImageList:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(noise(270, 300, number)))
    (tmp_path / "list.txt").write_text("".join(f"{number}.jpg {number}\n" for number in range(3)))
    return list_test_images("list", tmp_path / "list.txt")


@needs_dali
def test_both_loaders_are_timed_alone_and_followed_by_a_network(monkeypatch: pytest.MonkeyPatch, listing: ImageList) -> None:
    monkeypatch.setattr(evaluation, "_originals", lambda root, images: listing)
    rows = evaluation.measure(Path(), 1, 3, 1, "")
    assert [(row.stage, row.loader) for row in rows] == [
        ("decode", "torchvision"),
        ("decode", "dali"),
        ("end to end", "torchvision"),
        ("end to end", "dali"),
    ]
    assert all(row.images_per_second > 0 for row in rows)
    assert all(row.times_torchvision == 1 for row in rows if row.loader == "torchvision")


def test_loaders_that_return_different_pixels_or_labels_are_refused() -> None:
    images, labels = torch.randn(2, 3, 4, 4), torch.arange(2)
    evaluation._check_same({"a": [(images, labels)], "b": [(images + 0.001, labels)]}, 0.5)  # type: ignore[dict-item]
    with pytest.raises(DfkdError, match=r"images differ by 12\.75 of 255 levels"):
        evaluation._check_same({"a": [(images, labels)], "b": [(images + 0.1, labels)]}, 0.5)  # type: ignore[dict-item]
    with pytest.raises(DfkdError, match="different labels"):
        evaluation._check_same({"a": [(images, labels)], "b": [(images, labels + 1)]}, 0.5)  # type: ignore[dict-item]


def test_only_files_that_must_be_resized_are_timed(tmp_path: Path) -> None:
    names = ("n01440764", "n01443537", "n01484850", "n01491361")
    for number, name in enumerate(names):
        folder = tmp_path / "val" / name
        folder.mkdir(parents=True)
        (folder / "image.JPEG").write_bytes(jpeg(noise(250 + 10 * number, 400)))
    used = [path.parent.name for path in evaluation._originals(tmp_path, 5).paths]
    assert used == [names[number] for number in (1, 2, 3, 1, 2)]
