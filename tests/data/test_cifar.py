"""CIFAR-10 and CIFAR-100 in the layouts in which people have them. The files are tiny, and their MD5 stands in for the published one."""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision import datasets

from dfkd_fast.data import ArraySplit, DataSettings, open_split
from dfkd_fast.data.cifar import SUPERCLASSES
from dfkd_fast.data.splits import Split
from dfkd_fast.errors import DfkdError

COLOUR: dict[str, Any] = {"channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}
PER_FILE = 3
TEN, HUNDRED = "cifar-10-batches-py", "cifar-100-python"
# The coarse label of every fine label, as the files of CIFAR-100 hold them.
COARSE = [
    *(4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9),
    *(11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1),
    *(16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13),
]


def batch_of(number: int) -> dict[str, Any]:
    pixels = np.random.default_rng(number).integers(0, 256, (PER_FILE, 3 * 32 * 32), dtype=np.uint8)
    return {"data": pixels, "labels": [(number + index) % 10 for index in range(PER_FILE)]}


def write(path: Path, content: Any) -> list[str]:
    """Writes a pickle and returns its name and MD5, as torchvision lists them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))
    return [path.name, hashlib.md5(path.read_bytes()).hexdigest()]


@pytest.fixture
def ten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder, layout = tmp_path / TEN, datasets.CIFAR10
    training = [write(folder / f"data_batch_{number}", batch_of(number)) for number in range(1, 6)]
    name, digest = write(folder / "batches.meta", {"label_names": [*"abcdefghij"]})
    monkeypatch.setattr(layout, "train_list", training)
    monkeypatch.setattr(layout, "test_list", [write(folder / "test_batch", batch_of(6))])
    monkeypatch.setattr(layout, "meta", {"filename": name, "key": "label_names", "md5": digest})
    return tmp_path


@pytest.fixture
def hundred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each file has one image of every fine class."""
    folder, layout = tmp_path / HUNDRED, datasets.CIFAR100
    content = {"data": np.zeros((100, 3 * 32 * 32), np.uint8), "fine_labels": [*range(100)], "coarse_labels": COARSE}
    name, digest = write(folder / "meta", {"fine_label_names": [f"{number}" for number in range(100)]})
    monkeypatch.setattr(layout, "train_list", [write(folder / "train", content)])
    monkeypatch.setattr(layout, "test_list", [write(folder / "test", content)])
    monkeypatch.setattr(layout, "meta", {"filename": name, "key": "fine_label_names", "md5": digest})
    return tmp_path


def opened(root: Path, split: Split = "test", name: str = "cifar10", classes: int = 10) -> ArraySplit:
    images: Any = open_split(DataSettings(name=name, root=str(root), num_classes=classes, **COLOUR), split)
    assert isinstance(images, ArraySplit)
    return images


@pytest.mark.parametrize(("split", "numbers"), [("train", range(1, 6)), ("test", [6])])
@pytest.mark.parametrize("inside", ["", TEN])
def test_the_root_may_be_the_folder_of_the_batches_or_its_parent(ten: Path, split: Split, numbers: range, inside: str) -> None:
    images = opened(ten / inside, split)
    batches = [batch_of(number) for number in numbers]
    assert images.labels.tolist() == [label for batch in batches for label in batch["labels"]]
    np.testing.assert_array_equal(images.pixels.numpy(), np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32))


def test_the_folder_of_the_batches_may_have_any_name(ten: Path) -> None:
    (ten / TEN).rename(ten / "mine")
    assert len(opened(ten / "mine", "train")) == 5 * PER_FILE


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_missing_file_is_named(ten: Path, file: str, inside: bool) -> None:
    (ten / TEN / file).unlink()
    root, named = (ten / TEN, file) if inside else (ten, f"{TEN}/{file}")
    with pytest.raises(DfkdError, match=rf"data\.root {root} does not hold CIFAR10 in torchvision's layout: the file {named} is missing$"):
        opened(root)


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_damaged_file_is_named_with_both_checksums(ten: Path, file: str) -> None:
    path = ten / TEN / file
    before = hashlib.md5(path.read_bytes()).hexdigest()
    path.write_bytes(path.read_bytes()[:-1])
    after = hashlib.md5(path.read_bytes()).hexdigest()
    with pytest.raises(DfkdError, match=rf"{TEN}/{file} is damaged or not the published one: its MD5 is {after}, must be {before}$"):
        opened(ten)


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("inside", ["", TEN])
def test_a_forged_file_is_refused_before_it_is_unpickled(ten: Path, tmp_path: Path, file: str, split: Split, inside: str) -> None:
    forged = tmp_path / "executed"
    (ten / TEN / file).write_bytes(pickle.dumps(Attack(forged)))
    with pytest.raises(DfkdError, match=f"{file} is damaged or not the published one"):
        opened(ten / inside, split)
    assert not forged.exists()
    pickle.loads((ten / TEN / file).read_bytes()).close()
    assert forged.exists()  # the attack works


def test_torchvision_still_has_the_published_checksums() -> None:
    for layout in (datasets.CIFAR10, datasets.CIFAR100):
        for digest in (*(digest for _, digest in (*layout.train_list, *layout.test_list)), layout.meta["md5"]):
            assert len(bytes.fromhex(digest)) == 16


def test_an_archive_that_is_not_unpacked_is_named_with_the_command_that_unpacks_it(tmp_path: Path) -> None:
    root = tmp_path / "my data"
    root.mkdir()
    (root / "cifar-10-python.tar.gz").write_bytes(b"packed")
    command = f"tar -xzf '{root}/cifar-10-python.tar.gz' -C '{root}'"
    with pytest.raises(DfkdError, match=rf"cifar-10-python\.tar\.gz is not unpacked; do so with {command}$"):
        opened(root)
    assert [path.name for path in root.iterdir()] == ["cifar-10-python.tar.gz"]


@pytest.mark.parametrize(
    ("name", "classes", "folder"), [("cifar10", 10, TEN), ("cifar100", 100, HUNDRED), ("cifar100-coarse", 20, HUNDRED)]
)
def test_a_root_without_the_folder_names_the_folder(tmp_path: Path, name: str, classes: int, folder: str) -> None:
    with pytest.raises(
        DfkdError, match=rf"data\.root {tmp_path} does not hold CIFAR100? in torchvision's layout: it has no folder {folder}$"
    ):
        opened(tmp_path, name=name, classes=classes)


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar100_has_fine_and_coarse_labels(hundred: Path, split: Split) -> None:
    assert opened(hundred, split, "cifar100", 100).labels.tolist() == list(range(100))
    assert opened(hundred, split, "cifar100-coarse", 20).labels.tolist() == COARSE


def test_coarse_labels_need_20_classes(hundred: Path) -> None:
    with pytest.raises(DfkdError, match=r"data\.num_classes is 100, but 'cifar100-coarse' has 20 classes"):
        opened(hundred, name="cifar100-coarse", classes=100)


def test_each_superclass_has_five_classes_in_alphabetical_order() -> None:
    assert [*SUPERCLASSES] == sorted(SUPERCLASSES)
    assert {len(names) for names in SUPERCLASSES.values()} == {5}
    assert len({name for names in SUPERCLASSES.values() for name in names}) == 100
