"""Image and label files: supported layouts, pairing, and the labels read from them."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dfkd_fast.data import Batches, DataSettings, class_names, evaluation_batches, open_split, palette
from dfkd_fast.errors import DfkdError
from dfkd_fast.labels import IGNORE_INDEX

CPU = torch.device("cpu")
PLAIN: dict[str, Any] = {"channels": 3, "mean": (0.0,) * 3, "std": (1.0,) * 3, "image_size": 8}
REAL_CAMVID = Path(__file__).resolve().parents[3] / "shared" / "data" / "camvid" / "camvid-341x256.zip"
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def make_settings(root: Path, name: Any = "pairs", **changes: Any) -> DataSettings:
    classes = {"camvid": 11, "nyuv2": 13}.get(name, 5)
    return DataSettings(name=name, root=str(root), **{**PLAIN, "num_classes": classes, **changes})


def random_image(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(path: Path, pixels: Any, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels))
    if mode == "P":
        image.putpalette([255 - value // 3 for value in range(768)])
    image.save(path)


def write_pair(root: Path, images: str, labels: str, value: int = 1, size: tuple[int, int] = (8, 8)) -> None:
    write(root / images, np.full((*size, 3), value, np.uint8))
    write(root / labels, np.full(size, value, np.uint8))


def collect(batches: Batches) -> list[tuple[Tensor, Tensor]]:
    """Returns every image with values 0 to 255, (3, H, W), and its labels, (H, W)."""
    return [((255 * image).round(), label) for images, labels in batches for image, label in zip(images, labels, strict=True)]


def values(settings: DataSettings) -> list[tuple[int, int]]:
    """Returns the first value of every test image and its label."""
    return [(int(image[0, 0, 0]), int(label[0, 0])) for image, label in collect(evaluation_batches(settings, CPU))]


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("{}/images/a.jpg", "{}/labels/a.png"),
        ("images/{}/a.png", "labels/{}/a.png"),
        ("{}/0001TP_006690.png", "{}annot/0001TP_006690.png"),
        ("{}/nyu_rgb_0003.png", "{}_annot/new_nyu_class13_0003.png"),
        ("image/{}/00003.png", "seg13/{}/00003.png"),
        ("{}_rgb/0003.png", "{}_seg13/0003.png"),
        ("nyu_{}_rgb/nyu_rgb_0003.png", "nyuv2_{}_class13/new_nyu_class13_0003.png"),
        ("nyu_{}_rgb/nyu_rgb_0003.png", "{}_labels_13/new_nyu_class13_0003.png"),
    ],
)
def test_common_layouts_are_supported(tmp_path: Path, images: str, labels: str) -> None:
    for value, split in enumerate(("train", "test"), start=1):
        write_pair(tmp_path, images.format(split), labels.format(split), value)
    assert values(make_settings(tmp_path)) == [(2, 2)]
    image, label = open_split(make_settings(tmp_path), "train")[0]
    assert ((255 * image).round().unique().tolist(), label.unique().tolist()) == ([1], [1])


@pytest.mark.parametrize(("present", "used"), [(["train", "val"], 1), (["train", "val", "test"], 2)])
def test_the_test_split_is_read_from_test_or_else_from_val(tmp_path: Path, present: list[str], used: int) -> None:
    for value, split in enumerate(present):
        write_pair(tmp_path, f"{split}/images/a.png", f"{split}/labels/a.png", value)
    assert values(make_settings(tmp_path)) == [(used, used)]


def test_files_with_different_stems_are_paired_by_their_last_number(tmp_path: Path) -> None:
    for number in (3, 12, 120):
        write_pair(tmp_path, f"test/{number}.png", f"test_annot/new_nyu_class13_{number:04}.png", number % 5)
    assert values(make_settings(tmp_path)) == [(2, 2), (0, 0), (3, 3)]


def test_pairing_by_stem_takes_precedence_over_numbers(tmp_path: Path) -> None:
    for value, name in enumerate(("0001TP_006690", "0006R0_006690", "Seq05VD_006690")):
        write_pair(tmp_path, f"test/{name}.png", f"testannot/{name}.png", value)
    assert values(make_settings(tmp_path)) == [(0, 0), (1, 1), (2, 2)]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ("ab", "a", r"one label file of the same name or number; unpaired: test/images/b\.png$"),
        ("a", "abcdefg", r"unpaired: test/labels/b\.png, test/labels/c\.png, test/labels/d\.png, test/labels/e\.png and 2 more$"),
        (["frame_1", "other_1"], ["truth_1"], r"unpaired: test/images/frame_1\.png, test/images/other_1\.png, test/labels/truth_1\.png$"),
        ("a", "", r"unpaired: test/images/a\.png$"),
        ("", "a", "test/images contains no images"),
    ],
)
def test_unpaired_files_are_named(tmp_path: Path, images: list[str], labels: list[str], message: str) -> None:
    (tmp_path / "test/images").mkdir(parents=True)
    (tmp_path / "test/labels").mkdir()
    for folder, names in (("images", images), ("labels", labels)):
        for name in names:
            write(tmp_path / "test" / folder / f"{name}.png", random_image(8, 8)[..., 0])
    with pytest.raises(DfkdError, match=message) as error:
        evaluation_batches(make_settings(tmp_path), CPU)
    assert "\n" not in str(error.value)


def test_a_root_without_a_supported_layout_is_named_with_the_supported_ones(tmp_path: Path) -> None:
    (tmp_path / "test/images").mkdir(parents=True)
    problem = "has no folders of images and labels for the test split"
    with pytest.raises(DfkdError, match=rf"data\.root {tmp_path} {problem}; supported layouts: test/images \+ test/labels, "):
        evaluation_batches(make_settings(tmp_path), CPU)
    with pytest.raises(DfkdError, match=r"data\.root = '': data set 'camvid' needs the folder"):
        open_split(DataSettings(name="camvid", num_classes=11, **PLAIN), "train")


@pytest.mark.parametrize(
    ("name", "numbers", "labels"),
    [
        ("camvid", [0, 3, 10, 11, 255], [0, 3, 10, IGNORE_INDEX, IGNORE_INDEX]),
        ("nyuv2", [0, 1, 6, 13, 255], [IGNORE_INDEX, 0, 5, 12, IGNORE_INDEX]),
        ("pairs", [0, 2, 4, 255, 255], [0, 2, 4, IGNORE_INDEX, IGNORE_INDEX]),
    ],
)
@pytest.mark.parametrize("mode", ["L", "P"])
def test_ids_in_label_files_become_classes_and_ignore_index(
    tmp_path: Path, name: str, numbers: list[int], labels: list[int], mode: str
) -> None:
    write(tmp_path / "test/images/a.png", random_image(10, 8))
    write(tmp_path / "test/labels/a.png", np.repeat(np.array(numbers, np.uint8), 16).reshape(10, 8), mode)
    ((_, actual),) = collect(evaluation_batches(make_settings(tmp_path, name), CPU))
    assert actual.dtype == torch.int64
    assert actual.tolist() == np.repeat(labels, 16).reshape(10, 8).tolist()


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (random_image(8, 8), r"a\.png must have class IDs in one 8-bit channel .*, not mode RGB"),
        (np.zeros((8, 8), np.uint16), r"a\.png must have class IDs .*, not mode I;16"),
        (np.full((8, 8), 5, np.uint8), r"a\.png has class ID 5: must be 0 to 4, or 255 for unlabeled"),
        (np.zeros((8, 9), np.uint8), r"a\.png has 9 × 8 pixels, its image 8 × 8"),
    ],
)
def test_invalid_label_files_are_refused(tmp_path: Path, label: Any, message: str) -> None:
    for split in ("train", "test"):
        write(tmp_path / split / "images/a.png", random_image(8, 8))
        write(tmp_path / split / "labels/a.png", label)
    with pytest.raises(DfkdError, match=message):
        evaluation_batches(make_settings(tmp_path), CPU)
    with pytest.raises(DfkdError, match=message):
        open_split(make_settings(tmp_path), "train")


def test_a_single_pixel_of_an_unknown_class_is_detected_before_resizing(tmp_path: Path) -> None:
    label = np.zeros((80, 80), np.uint8)
    label[0, 0] = 12
    write(tmp_path / "test/images/a.png", random_image(80, 80))
    write(tmp_path / "test/labels/a.png", label)
    with pytest.raises(DfkdError, match="has class ID 12: must be 0 to 10, or 11 or 255 for unlabeled"):
        evaluation_batches(make_settings(tmp_path, "camvid"), CPU)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("camvid", {"num_classes": 12}, "data.num_classes is 12, but 'camvid' has 11 classes"),
        ("nyuv2", {"num_classes": 40}, "data.num_classes is 40, but 'nyuv2' has 13 classes"),
        ("shapes", {"num_classes": 10}, "data.num_classes is 10, but 'shapes' has 4 classes"),
        ("pairs", {"num_classes": 256}, "data.num_classes is 256: must be at most 255"),
        ("pairs", {"channels": 1, "mean": (0.0,), "std": (1.0,)}, "data.channels is 1: must be 3 for 'pairs'"),
    ],
)
def test_settings_that_do_not_match_the_data_set_are_named(tmp_path: Path, name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DfkdError, match=message):
        open_split(make_settings(tmp_path, name, **changes), "train")


@pytest.mark.parametrize(("resize", "height", "width"), [(0, 8, 12), (16, 16, 24), (40, 40, 60)])
def test_images_are_resized_as_by_pillow_and_labels_by_nearest_neighbor(tmp_path: Path, resize: int, height: int, width: int) -> None:
    image, label = random_image(20, 30), random_image(20, 30, seed=1)[..., 0] % 5
    write(tmp_path / "test/images/a.png", image)
    write(tmp_path / "test/labels/a.png", label)
    ((resized, resized_labels),) = collect(evaluation_batches(make_settings(tmp_path, resize=resize), CPU))
    expected = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(resized.numpy(), np.asarray(expected).transpose(2, 0, 1))
    rows, columns = ((np.arange(size) + 0.5) * whole // size for size, whole in ((height, 20), (width, 30)))
    np.testing.assert_array_equal(resized_labels.numpy(), label[rows.astype(int)][:, columns.astype(int)])


def test_files_that_cannot_be_decoded_are_left_out_and_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for value, name in enumerate("abc"):
            write_pair(tmp_path, f"{split}/images/{name}.png", f"{split}/labels/{name}.png", value)
        (tmp_path / split / "images/a.png").write_bytes(b"")
        (tmp_path / split / "labels/b.png").write_bytes(b"not an image")
    batches = evaluation_batches(make_settings(tmp_path), CPU)
    assert [int(label[0, 0]) for _, label in collect(batches)] == [2]
    assert batches.count == 3
    assert [line.partition(" (")[0] for line in batches.unreadable] == [
        str(tmp_path / "test" / name) for name in ("images/a.png", "labels/b.png")
    ]
    with pytest.raises(
        DfkdError, match=r"2 files cannot be decoded, the first .*a\.png \(is empty\); data\.strict = false leaves them out"
    ):
        open_split(make_settings(tmp_path), "train")
    rest: Any = open_split(make_settings(tmp_path, strict=False), "train")
    assert len(rest) == 1


def test_a_part_of_a_published_data_set_is_noted(tmp_path: Path) -> None:
    write_pair(tmp_path, "test/a.png", "testannot/a.png")
    logged: list[str] = []
    evaluation_batches(make_settings(tmp_path, "camvid"), CPU, log=logged.append)
    evaluation_batches(make_settings(tmp_path), CPU, log=logged.append)
    assert logged == [f"{tmp_path} has 1 of the 233 test images of camvid: the result is not comparable to published camvid mIoU"]


@pytest.mark.parametrize("name", ["camvid", "nyuv2", "pairs"])
def test_every_class_has_a_distinct_name_and_colour(name: str) -> None:
    settings = make_settings(Path(), name)
    colours = palette(settings)
    assert colours.shape == (settings.num_classes, 3)
    assert colours.dtype == torch.uint8
    assert len(set(class_names(settings))) == len({tuple(colour) for colour in colours.tolist()}) == settings.num_classes


def test_colours_are_those_of_the_papers() -> None:
    camvid, nyuv2 = make_settings(Path(), "camvid"), make_settings(Path(), "nyuv2")
    assert palette(camvid)[class_names(camvid).index("road")].tolist() == [128, 64, 128]
    assert palette(nyuv2)[class_names(nyuv2).index("bed")].tolist() == [0, 0, 255]
    # PASCAL VOC's: background, aeroplane, bicycle, …, television; all colours of 8-bit labels are distinct.
    voc = palette(make_settings(Path(), num_classes=255)).tolist()
    assert voc[:4] + voc[20:21] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 64, 128]]
    assert len(set(map(tuple, voc))) == 255


@pytest.mark.skipif(not REAL_CAMVID.is_file(), reason="the real CamVid is not beside this checkout")
def test_the_real_camvid_has_its_images_and_its_classes_look_like_themselves(tmp_path: Path) -> None:
    with zipfile.ZipFile(REAL_CAMVID) as archive:
        archive.extractall(tmp_path, [name for name in archive.namelist() if "test/" in name])
    logged: list[str] = []
    settings = make_settings(tmp_path, "camvid", image_size=128, batch_size=50)
    loaded = list(evaluation_batches(settings, CPU, log=logged.append))
    assert (sum(len(labels) for _, labels in loaded), logged) == (233, [])
    labels = torch.cat([labels for _, labels in loaded])
    assert labels.unique().tolist() == [IGNORE_INDEX, *range(11)]
    brightness = torch.cat([images for images, _ in loaded]).mean(dim=1)
    by_name = {name: brightness[labels == label].mean().item() for label, name in enumerate(class_names(settings))}
    assert max(by_name, key=by_name.__getitem__) == "sky"
    share = labels[labels >= 0].bincount() / (labels >= 0).sum()
    assert set(share.argsort(descending=True)[:2].tolist()) == {
        class_names(settings).index("road"),
        class_names(settings).index("building"),
    }
