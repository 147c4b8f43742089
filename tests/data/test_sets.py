import gzip
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from sklearn.datasets import load_digits
from torch import Tensor

from dfkd_fast.data import ArraySplit, DataSettings, batches, evaluation_batches, open_split
from dfkd_fast.data.splits import Split
from dfkd_fast.errors import DfkdError

SPLITS: list[Split] = ["train", "test"]
COLOUR: dict[str, Any] = {"channels": 3, "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.25, 0.2)}
REAL_MNIST = Path(__file__).resolve().parents[3] / "shared" / "data" / "mnist"
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def noise(*shape: int) -> Pixels:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def make_settings(name: Any, root: Path | None = None, **changes: Any) -> DataSettings:
    return DataSettings(name=name, root=str(root or ""), **changes)


def images_of(split: Any) -> tuple[Tensor, list[int]]:
    images, labels = zip(*(split[index] for index in range(len(split))), strict=True)
    return torch.stack(images), [int(label) for label in labels]


def normalized(images: Pixels, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray[Any, np.dtype[np.float64]]:
    scaled: np.ndarray[Any, np.dtype[np.float64]] = (images / 255 - np.array(mean)) / np.array(std)
    return scaled.transpose(0, 3, 1, 2)


def digit_rows(split: Split) -> tuple[list[bytes], list[int]]:
    images, labels = images_of(open_split(make_settings("digits", image_size=8, mean=(0.0,), std=(1.0,)), split))
    return [np.rint(16 * image.numpy()).astype(np.uint8).tobytes() for image in images], labels


def test_digits_are_split_into_disjoint_stratified_quarters() -> None:
    (train, train_labels), (test, test_labels) = digit_rows("train"), digit_rows("test")
    pixels, labels = load_digits(return_X_y=True)
    everything = [(row.astype(np.uint8).tobytes(), int(label)) for row, label in zip(pixels, labels, strict=True)]
    assert Counter(zip(train + test, train_labels + test_labels, strict=True)) == Counter(everything)
    assert (len(train), len(test)) == (1347, 450)
    for digit, count in Counter(labels.tolist()).items():
        assert test_labels.count(digit) == pytest.approx(count / 4, abs=1)


def test_the_split_of_digits_does_not_depend_on_the_seed() -> None:
    np.random.seed(1)
    first = digit_rows("test")
    np.random.seed(2)
    assert digit_rows("test") == first


def idx(array: Pixels) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


def write_mnist(root: Path, folder: str) -> Path:
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 7), ("t10k", 5)):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(idx(noise(count, 28, 28)))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8)))
    return raw


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
@pytest.mark.parametrize(("split", "count"), [("train", 7), ("test", 5)])
def test_mnist_is_read_from_torchvisions_layout(tmp_path: Path, name: str, folder: str, split: Split, count: int) -> None:
    write_mnist(tmp_path, folder)
    images, labels = images_of(open_split(make_settings(name, tmp_path, image_size=28, mean=(0.1,), std=(0.3,)), split))
    assert labels == list(range(count))
    np.testing.assert_allclose(images.numpy(), normalized(noise(count, 28, 28)[..., None], (0.1,), (0.3,)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"hello, this is text", id="text"),
        pytest.param(gzip.compress(b"as downloaded"), id="still packed"),
        pytest.param(idx(noise(5, 28, 28))[:1000], id="half"),
    ],
)
@pytest.mark.parametrize("part", ["images-idx3", "labels-idx1"])
def test_a_damaged_mnist_file_is_a_one_line_error(tmp_path: Path, damage: bytes, part: str) -> None:
    raw = write_mnist(tmp_path, "MNIST")
    (raw / f"t10k-{part}-ubyte").write_bytes(damage)
    with pytest.raises(DfkdError, match=r"MNIST in torchvision's layout: \S|data set 'mnist', test: "):
        open_split(make_settings("mnist", tmp_path), "test")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_a_root_without_the_data_set_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DfkdError, match=f"data.root {tmp_path} does not hold .* in torchvision's layout: Dataset not found"):
        open_split(make_settings(name, tmp_path), "test")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100", "npz", "folder"])
def test_a_missing_or_empty_root_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DfkdError, match=f"data.root = '': data set '{name}' needs the folder"):
        open_split(make_settings(name), "test")
    with pytest.raises(DfkdError, match=r"data\.root .*absent does not exist"):
        open_split(make_settings(name, tmp_path / "absent"), "test")


def test_the_data_set_none_has_no_images() -> None:
    with pytest.raises(DfkdError, match=r"data\.name is 'none'"):
        open_split(make_settings("none"), "test")


def write_npz(path: Path, **changed: object) -> Path:
    arrays: dict[str, Any] = {"x_train": noise(7, 9, 9, 3), "y_train": np.arange(7), "x_test": noise(5, 9, 9, 3), "y_test": np.arange(5)}
    np.savez(path, **{name: array for name, array in {**arrays, **changed}.items() if array is not None})
    return path


@pytest.mark.parametrize(("split", "count"), [("train", 7), ("test", 5)])
def test_an_npz_file_is_read(tmp_path: Path, split: Split, count: int) -> None:
    settings = make_settings("npz", write_npz(tmp_path / "set.npz"), image_size=9, **COLOUR)
    images, labels = images_of(open_split(settings, split))
    assert labels == list(range(count))
    np.testing.assert_allclose(images.numpy(), normalized(noise(count, 9, 9, 3), COLOUR["mean"], COLOUR["std"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [">i8", ">i2", "<u2", ">u8", "<i4", "u1"])
def test_labels_in_an_npz_file_may_be_integers_of_any_size_and_byte_order(tmp_path: Path, kind: str) -> None:
    settings = make_settings("npz", write_npz(tmp_path / "set.npz", y_test=np.arange(5).astype(kind)), image_size=9, **COLOUR)
    ((_, labels),) = evaluation_batches(settings, torch.device("cpu"))
    assert labels.dtype == torch.int64
    assert labels.tolist() == list(range(5))


def test_labels_in_an_npz_file_may_be_a_column_as_keras_has_them(tmp_path: Path) -> None:
    settings = make_settings("npz", write_npz(tmp_path / "set.npz", y_test=np.arange(5)[:, None]), image_size=9, **COLOUR)
    _, labels = images_of(open_split(settings, "test"))
    assert labels == list(range(5))


def test_grayscale_images_in_an_npz_file_need_no_axis_of_channels(tmp_path: Path) -> None:
    settings = make_settings("npz", write_npz(tmp_path / "set.npz", x_test=noise(5, 9, 9)), image_size=9, mean=(0.1,), std=(0.3,))
    images, _ = images_of(open_split(settings, "test"))
    np.testing.assert_allclose(images.numpy(), normalized(noise(5, 9, 9)[..., None], (0.1,), (0.3,)), rtol=1e-5, atol=1e-6)


def test_an_npz_file_of_medmnists_keys_is_read(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {f"{split}_images": noise(5, 9, 9) for split in ("train", "val", "test")}
    arrays |= {f"{split}_labels": np.arange(5)[:, None] for split in ("train", "val", "test")}
    np.savez(tmp_path / "set.npz", **arrays)
    for split in SPLITS:
        images, labels = images_of(open_split(make_settings("npz", tmp_path / "set.npz", image_size=9), split))
        assert (images.shape, labels) == ((5, 1, 9, 9), list(range(5)))


def test_images_in_an_npz_file_may_be_in_fortrans_order(tmp_path: Path) -> None:
    settings = make_settings("npz", write_npz(tmp_path / "set.npz", x_test=np.asfortranarray(noise(5, 9, 9, 3))), image_size=9, **COLOUR)
    images, _ = images_of(open_split(settings, "test"))
    np.testing.assert_allclose(images.numpy(), normalized(noise(5, 9, 9, 3), COLOUR["mean"], COLOUR["std"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x_test": None}, r"set.npz has no x_test: its arrays are \['x_train', 'y_test', 'y_train'\]"),
        ({"x_test": None, "y_test": None}, "has no x_test, y_test"),
        ({"x_test": np.zeros((5, 9, 9, 3))}, r"images must be uint8 \(N, H, W, C\) with at least one pixel, not float64 \(5, 9, 9, 3\)"),
        ({"x_test": noise(5, 9)}, r"images must be .* not uint8 \(5, 9\)"),
        ({"x_test": noise(5, 9, 9)}, "images have 1 channels, data.channels is 3"),
        ({"x_test": noise(5, 9, 9, 1)}, "images have 1 channels, data.channels is 3"),
        ({"y_test": np.arange(4)}, r"labels must be integers \(5,\), not int64 \(4,\)"),
        ({"y_test": np.zeros(5)}, "labels must be integers .* not float64"),
        ({"y_test": np.zeros((5, 2), np.int64)}, r"labels must be .* \(5, 2\)"),
        ({"y_test": np.full(5, 10)}, "labels run from 10 to 10, data.num_classes is 10"),
        ({"y_test": np.arange(-1, 4)}, "labels run from -1 to 3"),
        ({"x_test": noise(0, 9, 9, 3), "y_test": np.arange(0)}, "there are no images"),
        ({"x_test": np.array([{}], dtype=object)}, "set.npz, x_test cannot be read as an array: Object arrays"),
    ],
)
def test_arrays_that_do_not_match_the_recipe_are_named(tmp_path: Path, changed: dict[str, object], message: str) -> None:
    with pytest.raises(DfkdError, match=message):
        open_split(make_settings("npz", write_npz(tmp_path / "set.npz", **changed), **COLOUR), "test")


@pytest.mark.parametrize("damage", ["half", "flipped byte", "text", "empty", "npy"])
def test_a_damaged_npz_file_is_a_one_line_error(tmp_path: Path, damage: str) -> None:
    path = write_npz(tmp_path / "set.npz")
    whole = path.read_bytes()
    path.unlink()
    if damage == "npy":
        with path.open("wb") as file:
            np.save(file, noise(5, 9, 9, 3))
    else:
        middle = whole.index(noise(5, 9, 9, 3).tobytes())
        flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
        path.write_bytes({"half": whole[: len(whole) // 2], "flipped byte": flipped, "text": b"hello", "empty": b""}[damage])
    with pytest.raises(DfkdError, match=r"set\.npz(, x_test cannot be read as an array| cannot be read as an \.npz file): \S"):
        open_split(make_settings("npz", path, **COLOUR), "test")


def write_folder(root: Path, name: str, pixels: Pixels, classes: Sequence[str] = "ab") -> None:
    for label in classes:
        (root / name / label).mkdir(parents=True)
        Image.fromarray(pixels).save(root / name / label / "0.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_images_in_folders_are_resized_center_cropped_and_normalized(tmp_path: Path, channels: int) -> None:
    pixels = noise(160, 240, 3)
    write_folder(tmp_path, "val", pixels)
    mean, std = (0.5, 0.4, 0.3)[:channels], (0.5, 0.25, 0.2)[:channels]
    settings = make_settings("folder", tmp_path, num_classes=2, channels=channels, image_size=112, mean=mean, std=std, loader="torchvision")
    (images, labels), *rest = evaluation_batches(settings, torch.device("cpu"))
    assert (labels.tolist(), rest) == ([0, 1], [])
    # The shorter side is 112 · 256 / 224 = 128, so the longer side is 192, and the margins are 8 and 40.
    expected = Image.fromarray(pixels).resize((192, 128), Image.Resampling.BILINEAR).crop((40, 8, 152, 120))
    cropped = np.asarray(expected.convert("L" if channels == 1 else "RGB")).reshape(1, 112, 112, channels)
    np.testing.assert_allclose(images[:1].numpy(), normalized(cropped, mean, std), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [32, 64])
def test_small_images_of_the_networks_size_are_neither_resized_nor_cropped(tmp_path: Path, size: int) -> None:
    pixels = noise(size, size, 3)
    for name in ("train", "test"):
        write_folder(tmp_path, name, pixels)
    settings = make_settings("folder", tmp_path, num_classes=2, image_size=size, loader="torchvision", **COLOUR)
    ((tested, _),) = evaluation_batches(settings, torch.device("cpu"))
    trained, _ = images_of(open_split(settings, "train"))
    for images in (tested, trained):
        np.testing.assert_allclose(images[:1].numpy(), normalized(pixels[None], COLOUR["mean"], COLOUR["std"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("augment", "mode"), [("shift", "constant"), ("reflect", "reflect")])
def test_small_training_images_are_shifted_by_up_to_4_pixels_as_arrays_are(tmp_path: Path, augment: Any, mode: Any) -> None:
    torch.manual_seed(0)
    pixels = np.arange(1, 1 + 8 * 8, dtype=np.uint8).reshape(8, 8)
    write_folder(tmp_path, "train", pixels)
    settings = make_settings("folder", tmp_path, num_classes=2, image_size=8, mean=(0.0,), std=(1 / 255,))
    split: Any = open_split(settings, "train", augment=augment)
    padded = np.pad(pixels, 4, mode=mode)
    shifts = {padded[top : top + 8, left : left + 8].tobytes() for top in range(9) for left in range(9)}
    seen = {split[0][0][0].round().to(torch.uint8).numpy().tobytes() for _ in range(60)}
    assert seen <= shifts
    assert len(seen) > 25


@pytest.mark.parametrize(("present", "used"), [("val", "val"), ("test", "test"), ("train val test", "val")])
def test_the_test_images_are_in_val_or_else_in_test(tmp_path: Path, present: str, used: str) -> None:
    for name in present.split():
        write_folder(tmp_path, name, np.full((9, 9, 3), 255 if name == used else 0, np.uint8))
    ((images, _),) = evaluation_batches(make_settings("folder", tmp_path, num_classes=2), torch.device("cpu"))
    torch.testing.assert_close(images, torch.ones(2, 1, 32, 32))


def test_the_training_images_are_in_train(tmp_path: Path) -> None:
    for name in ("train", "val"):
        write_folder(tmp_path, name, np.full((9, 9, 3), 255 if name == "train" else 0, np.uint8))
    images, _ = images_of(open_split(make_settings("folder", tmp_path, num_classes=2), "train"))
    torch.testing.assert_close(images, torch.ones(2, 1, 32, 32))


def test_files_of_other_programs_are_not_training_images(tmp_path: Path) -> None:
    write_folder(tmp_path, "train", np.full((9, 9, 3), 255, np.uint8))
    write_folder(tmp_path, "train", np.zeros((9, 9, 3), np.uint8), [".ipynb_checkpoints", "__MACOSX", "a/.ipynb_checkpoints"])
    (tmp_path / "train/a/._0.png").write_bytes(b"of macOS")
    (tmp_path / "train/b/Thumbs.db").write_bytes(b"of Windows")
    images, labels = images_of(open_split(make_settings("folder", tmp_path, num_classes=2), "train"))
    torch.testing.assert_close(images, torch.ones(2, 1, 32, 32))
    assert labels == [0, 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_image_that_cannot_be_decoded_is_named_or_left_out(tmp_path: Path, workers: int) -> None:
    write_folder(tmp_path, "train", noise(9, 9, 3), "abc")
    (tmp_path / "train/b/0.png").write_bytes(b"")

    def load_labels(**changes: Any) -> list[list[int]]:
        split = open_split(make_settings("folder", tmp_path, num_classes=3, **changes), "train")
        return [labels.tolist() for _, labels in batches(split, 2, workers=workers)]

    with pytest.raises(DfkdError, match=r"^image .*train/b/0\.png \(is empty\) cannot be decoded; data\.strict = false leaves it out$"):
        load_labels()
    assert load_labels(strict=False) == [[0], [2]]
    (tmp_path / "train/a/0.png").write_bytes(b"")
    assert load_labels(strict=False) == [[2]]


def test_a_class_without_training_images_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, "train", noise(9, 9, 3), "abc")
    (tmp_path / "train/b/0.png").unlink()
    with pytest.raises(DfkdError, match="train has no images of 1 of 3 classes, the first is b"):
        open_split(make_settings("folder", tmp_path, num_classes=3), "train")


@pytest.mark.parametrize(
    ("augment", "rising"), [("shift", {True}), ("reflect", {True}), ("shift_flip", {True, False}), ("reflect_flip", {True, False})]
)
def test_augmented_images_are_randomly_cropped_and_mirrored_only_with_flips(tmp_path: Path, augment: Any, rising: set[bool]) -> None:
    torch.manual_seed(0)
    ramp = np.broadcast_to(np.arange(0, 240, 2, dtype=np.uint8)[None, :, None], (120, 120, 3))
    write_folder(tmp_path, "train", ramp.copy())
    split: Any = open_split(make_settings("folder", tmp_path, num_classes=2, image_size=80), "train", augment=augment)
    crops = [split[0][0] for _ in range(20)]
    assert all(image.shape == (1, 80, 80) for image in crops)
    assert {bool(image[0, 0, -1] > image[0, 0, 0]) for image in crops} == rising
    assert len({image.mean().item() for image in crops}) > 10


@pytest.mark.parametrize(
    ("names", "classes", "changes", "message"),
    [
        ("", "ab", {}, "has no folder"),
        ("train", "ab", {}, "has no folder val or test"),
        ("val", "ab", {}, "has no folder train"),
        ("train val", "abc", {}, "data.num_classes is 2, but .* has 3 classes"),
        ("train val", "", {}, "has no folders, one per class is expected"),
        ("train val", "ab", {"channels": 4, "mean": (0.5,) * 4, "std": (0.5,) * 4}, "channels"),
    ],
)
def test_folders_that_do_not_match_the_recipe_are_named(
    tmp_path: Path, names: str, classes: str, changes: dict[str, Any], message: str
) -> None:
    for name in names.split():
        (tmp_path / name).mkdir()
        write_folder(tmp_path, name, noise(9, 9, 3), classes)
    settings = make_settings("folder", tmp_path, num_classes=2, **changes)
    with pytest.raises(DfkdError, match=message):
        open_split(settings, "train") and evaluation_batches(settings, torch.device("cpu"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "imagenette"}, "name"),
        ({"channels": 3}, "mean has 1 numbers for 3 channels"),
        ({"channels": 2, "mean": (0.5, 0.5)}, "std has 1 numbers for 2 channels"),
        ({"std": (0.0,)}, "std"),
        ({"num_classes": 1}, "num_classes"),
        ({"image_size": 7}, "image_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"workers": -1}, "workers"),
        ({"mean": (float("nan"),)}, "mean"),
        ({"batchsize": 5}, "batchsize"),
    ],
)
def test_an_invalid_value_in_the_section_names_the_field(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataSettings(**wrong)


@pytest.mark.parametrize("augment", ["shift", "shift_flip", "reflect", "reflect_flip"])
def test_augmentation_changes_the_images(augment: Any) -> None:
    torch.manual_seed(0)
    plain: Any = open_split(make_settings("digits"), "train")
    changed: Any = open_split(make_settings("digits"), "train", augment=augment)
    assert isinstance(changed, ArraySplit)
    assert not torch.equal(changed.__getitems__([0, 1, 2, 3])[0], plain.__getitems__([0, 1, 2, 3])[0])


@pytest.mark.skipif(not REAL_MNIST.is_dir(), reason="the real MNIST is not beside this checkout")
def test_the_real_mnist_has_the_known_counts_and_moments(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for packed in REAL_MNIST.glob("*.gz"):
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    split = open_split(make_settings("mnist", tmp_path, image_size=28, mean=(0.1307,), std=(0.3081,)), "train")
    assert isinstance(split, ArraySplit)
    assert torch.bincount(split.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    images, _ = split.__getitems__(list(range(0, 60000, 7)))
    assert images.mean().item() == pytest.approx(0, abs=0.01)
    assert images.std().item() == pytest.approx(1, abs=0.01)
