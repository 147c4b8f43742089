"""The registry of data sets: an entry is all that a data set needs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dfkd_fast import load_recipe
from dfkd_fast.data import DATA_SETS, DataSettings, class_names, evaluation_batches, open_split, palette
from dfkd_fast.data.arrays import ArraySet
from dfkd_fast.data.splits import Split
from dfkd_fast.errors import DfkdError
from dfkd_fast.recipe_files import shipped_recipes


def stripes(root: Path, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Returns images with as many white columns as their label, for as many classes as the root's name has letters."""
    labels = np.arange(12 if split == "train" else 7) % len(root.name)
    images = np.zeros((len(labels), 32, 32, 1), np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:, :label] = 255
    return images, labels


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> DataSettings:
    monkeypatch.setitem(DATA_SETS, "stripes", ArraySet(read=stripes))
    root = tmp_path / "abcd"
    root.mkdir()
    return DataSettings(name="stripes", root=str(root), num_classes=4, mean=(0.0,), std=(1.0,), batch_size=5)


def test_a_registered_data_set_can_be_loaded(toy: DataSettings) -> None:
    training = open_split(toy, "train")
    image, label = training[6]
    assert (int(label), int(image.sum())) == (2, 2 * 32)
    batches = evaluation_batches(toy, torch.device("cpu"))
    assert batches.count == 7
    assert [labels.tolist() for _, labels in batches] == [[0, 1, 2, 3, 0], [1, 2]]
    assert (toy.task, toy.metric, toy.has_images, toy.can_be_opened) == ("classification", "top-1 accuracy", True, True)
    assert class_names(toy) == ["0", "1", "2", "3"]
    assert palette(toy).shape == (4, 3)


def test_a_recipe_can_name_a_registered_data_set(toy: DataSettings) -> None:
    recipe = load_recipe("digits", {"data.name": "stripes", "data.root": toy.root, "data.num_classes": 4})
    assert recipe.data.data_set is DATA_SETS["stripes"]


def test_an_unknown_data_set_is_a_one_line_error_that_suggests_the_nearest() -> None:
    with pytest.raises(
        DfkdError, match=r"data\.name = 'minst': unknown choice 'minst': did you mean 'mnist'\? must be one of camvid, cifar10, .*nyuv2"
    ):
        load_recipe("digits", {"data.name": "minst"})


@pytest.mark.parametrize("name", [name for name, row in DATA_SETS.items() if row.needs_root])
def test_a_data_set_on_disk_requires_a_root(name: str) -> None:
    classes = DATA_SETS[name].classes or len(class_names(DataSettings(name=name)))
    settings = DataSettings(name=name, num_classes=classes, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert not settings.can_be_opened
    with pytest.raises(DfkdError, match=rf"data\.root = '': data set '{name}' needs the folder that holds it"):
        evaluation_batches(settings, torch.device("cpu"))


def test_the_data_set_none_cannot_be_loaded() -> None:
    settings = DataSettings(name="none")
    assert not settings.has_images and not settings.can_be_opened
    for use in (lambda: evaluation_batches(settings, torch.device("cpu")), lambda: open_split(settings, "train")):
        with pytest.raises(DfkdError, match=r"data\.name is 'none': this recipe has no images to read"):
            use()


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_have_the_registered_number_of_classes(name: str) -> None:
    data = load_recipe(name).data
    assert data.data_set.classes in (None, data.num_classes)
    if data.task == "segmentation":
        assert len(class_names(data)) == data.num_classes
