"""``data.holdout``: training images that are held out, and that everything is evaluated on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dfkd_fast.data import DATA_SETS, ArraySplit, DataSettings, evaluation_batches, open_split
from dfkd_fast.data.splits import Split

CPU = torch.device("cpu")


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """An .npz file of 40 training and 10 test images, each of which has its own grey level: 0 to 39, and 200 to 209."""
    levels = {"train": np.arange(40), "test": np.arange(200, 210)}
    arrays: dict[str, Any] = {
        f"x_{split}": np.broadcast_to(level[:, None, None, None], (len(level), 8, 8, 1)) for split, level in levels.items()
    }
    labels = {f"y_{split}": level % 10 for split, level in levels.items()}
    path = tmp_path / "set.npz"
    np.savez(path, **{name: array.astype(np.uint8) for name, array in arrays.items()}, **labels)  # type: ignore[arg-type]
    return path


def settings_of(path: Path, **changes: Any) -> DataSettings:
    return DataSettings(name="npz", root=str(path), image_size=8, mean=(0.0,), std=(1 / 255,), **changes)


def levels(split: Any) -> list[int]:
    assert isinstance(split, ArraySplit)
    return split.pixels[:, 0, 0, 0].tolist()


def evaluated(settings: DataSettings, rank: int = 0, world_size: int = 1) -> Tensor:
    return (
        torch.cat([images[:, 0, 0, 0] for images, _ in evaluation_batches(settings, CPU, rank=rank, world_size=world_size)]).round().long()
    )


def test_the_held_out_images_are_the_first_of_a_permutation_with_seed_0(numbered: Path) -> None:
    held_out = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:15].tolist()
    settings = settings_of(numbered, holdout=15)
    assert evaluated(settings).tolist() == sorted(held_out)
    assert levels(open_split(settings, "train")) == sorted({*range(40)} - {*held_out})
    assert levels(open_split(settings, "test")) == sorted(held_out)


@pytest.mark.parametrize(("split", "expected"), [("train", list(range(40))), ("test", list(range(200, 210)))])
def test_without_a_holdout_the_splits_are_the_files_own(numbered: Path, split: Split, expected: list[int]) -> None:
    assert levels(open_split(settings_of(numbered), split)) == expected


def test_labels_stay_with_their_images(numbered: Path) -> None:
    splits: tuple[Split, ...] = ("train", "test")
    for split in splits:
        opened: Any = open_split(settings_of(numbered, holdout=15), split)
        assert opened.labels.tolist() == [level % 10 for level in levels(opened)]


def test_a_smaller_holdout_is_a_subset_of_a_larger_one(numbered: Path) -> None:
    small, large = (set(evaluated(settings_of(numbered, holdout=count)).tolist()) for count in (5, 20))
    assert small < large


def test_the_held_out_images_depend_neither_on_the_global_seed_nor_on_reading_them(numbered: Path) -> None:
    torch.manual_seed(1)
    first, state = evaluated(settings_of(numbered, holdout=15)), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(evaluated(settings_of(numbered, holdout=15)), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_subset_is_a_part_of_the_held_out_images(numbered: Path) -> None:
    part, whole = (set(evaluated(settings_of(numbered, holdout=20, subset=subset)).tolist()) for subset in (6, 0))
    assert len(part) == 6
    assert part < whole


def test_processes_share_the_held_out_images(numbered: Path) -> None:
    settings = settings_of(numbered, holdout=15)
    shares = [evaluated(settings, rank=rank, world_size=4) for rank in range(4)]
    assert sorted(torch.cat(shares).tolist()) == evaluated(settings).tolist()


@pytest.mark.parametrize(
    ("changes", "metric", "images"),
    [
        ({}, "top-1 accuracy", "test images"),
        ({"subset": 100}, "top-1 accuracy", "test images"),
        ({"holdout": 5000}, "top-1 accuracy (5,000 held-out training images)", "5,000 held-out training images"),
        (
            {"holdout": 5000, "subset": 1000},
            *["top-1 accuracy (1,000 of 5,000 held-out training images)", "1,000 of 5,000 held-out training images"],
        ),
    ],
)
def test_the_metric_says_that_the_images_are_held_out(changes: dict[str, int], metric: str, images: str) -> None:
    settings = DataSettings(name="cifar10", **changes)  # type: ignore[arg-type]
    assert (settings.metric, settings.evaluated_on) == (metric, images)


def test_array_data_sets_support_it_and_others_say_that_they_do_not() -> None:
    arrays = {"digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "cifar100-coarse", "npz"}
    for name in DATA_SETS:
        if name in arrays:
            assert DataSettings(name=name, holdout=5).holdout == 5
        else:
            with pytest.raises(ValueError, match=rf"holdout = 5: must be 0 for data set '{name}'; only digits, mnist, .* support it"):
                DataSettings(name=name, holdout=5)
