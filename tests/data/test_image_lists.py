import os
from pathlib import Path
from typing import Any

import pytest
from timm.data.imagenet_info import ImageNetInfo

from dfkd_fast.data import DATA_SETS, DataSettings, list_test_images, open_split
from dfkd_fast.data.image_lists import IMAGENET
from dfkd_fast.errors import DfkdError


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_class_folders_are_numbered_by_name_and_files_are_sorted(tmp_path: Path) -> None:
    touch(tmp_path / "val/b/2.png", tmp_path / "val/b/1.JPEG", tmp_path / "val/a/x/deep.jpg", tmp_path / "val/a/notes.txt")
    (tmp_path / "val/c").mkdir()
    image_list = list_test_images("folder", tmp_path)
    assert [path.name for path in image_list.paths] == ["deep.jpg", "1.JPEG", "2.png"]
    assert (image_list.labels, image_list.classes, image_list.note) == ((0, 1, 1), 3, None)


@pytest.mark.parametrize("subfolder", ["val", "."])
def test_imagenets_wordnet_ids_are_numbered_in_sorted_order(tmp_path: Path, subfolder: str) -> None:
    touch(*(tmp_path / subfolder / wnid / "image.JPEG" for wnid in reversed(IMAGENET)))
    image_list = list_test_images("imagenet", tmp_path)
    assert image_list.labels == tuple(range(1000))
    assert image_list.paths[7].parent.name == "n01514668"  # a cock
    assert (
        image_list.note
        == f"{tmp_path} has 1,000 of the 50,000 validation images of imagenet: the result is not comparable to published imagenet accuracy"
    )


def test_imagenets_classes_have_timms_order() -> None:
    assert list(IMAGENET) == ImageNetInfo("imagenet-1k").label_names()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("folders", "labels"),
    [
        pytest.param(["n01440764", "n02102040", "n02979186", "n03000684"], (0, 217, 482, 491), id="Imagenette's"),
        pytest.param(["n15075141"], (999,), id="one"),
        pytest.param(["0", "1", "10", "2", "999"], (0, 1, 10, 2, 999), id="ImageNet-V2's numbers"),
        pytest.param(["000", "010", "0999"], (0, 10, 999), id="numbers with zeros in front"),
    ],
)
def test_a_subset_of_imagenets_folders_keeps_imagenets_labels(tmp_path: Path, folders: list[str], labels: tuple[int, ...]) -> None:
    touch(*(tmp_path / "val" / name / "1.JPEG" for name in folders))
    image_list = list_test_images("imagenet", tmp_path)
    assert (image_list.labels, image_list.classes) == (labels, 1000)
    assert str(image_list.note).startswith(
        f"{tmp_path / 'val'} has {len(folders)} of ImageNet's 1,000 classes, {IMAGENET[labels[0]]} to {IMAGENET[max(labels)]};"
        f" predictions are over all 1,000; {tmp_path} has "
    )


def test_folders_that_are_not_imagenet_classes_are_named(tmp_path: Path) -> None:
    touch(tmp_path / "val/n01440764/1.JPEG", tmp_path / "val/tench/1.JPEG", tmp_path / "val/1000/1.JPEG")
    with pytest.raises(DfkdError, match=r"2 of 3 folders are not ImageNet classes, the first is '1000'; .* such as n01440764"):
        list_test_images("imagenet", tmp_path)


def test_imagenet_training_requires_images_of_every_class(tmp_path: Path) -> None:
    colour = {"channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    settings = DataSettings(name="imagenet", root=str(tmp_path), num_classes=1000, **colour)  # type: ignore[arg-type]
    touch(*(tmp_path / "train" / str(number) / "1.JPEG" for number in range(1000)))
    split: Any = open_split(settings, "train")
    assert [int(Path(path).parent.name) for path in split.paths] == list(split.labels)
    (tmp_path / "train/7/1.JPEG").unlink()
    with pytest.raises(DfkdError, match="train has no images of 1 of 1000 classes, the first is n01514668"):
        open_split(settings, "train")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        pytest.param("val.txt", "1.JPEG 217\n2.JPEG 0\n", id="numbers"),
        pytest.param("val.txt", "val/1.JPEG n02102040\nval/2.JPEG n01440764\n3.JPEG n15075141\n", id="WordNet ids, paths, one more"),
        pytest.param("val/labels.txt", "1\tn02102040\r\n2\tn01440764\r\n", id="tabs and Windows' line ends"),
        pytest.param(
            "LOC_val_solution.csv",
            "ImageId,PredictionString\n2,n01440764 85 1 499 272 n01440764 1 2 3 4 \n1,n02102040 1 1 9 9 \n",
            id="Kaggle's",
        ),
        pytest.param("labels.csv", "1.JPEG,n02102040\n2.JPEG,n01440764\n", id="a table without a header"),
    ],
)
@pytest.mark.parametrize("junk", [(), ("val/.ipynb_checkpoints/1.JPEG", "val/._1.JPEG")])
def test_imagenet_images_in_one_folder_take_their_labels_from_a_label_file(
    tmp_path: Path, name: str, text: str, junk: tuple[str, ...]
) -> None:
    touch(tmp_path / "val/1.JPEG", tmp_path / "val/2.JPEG", *(tmp_path / path for path in junk))
    (tmp_path / name).write_bytes(text.encode())
    image_list = list_test_images("imagenet", tmp_path)
    assert [path.name for path in image_list.paths] == ["1.JPEG", "2.JPEG"]
    assert (image_list.labels, image_list.classes) == ((217, 0), 1000)
    assert str(image_list.note).startswith(f"labels are read from {tmp_path / name}; ")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("val.txt", "1.JPEG 1000\n", r"val\.txt, line 1: '1\.JPEG 1000' must be an image name and a WordNet ID or number, 0 to 999"),
        ("val.txt", "1.JPEG 0\n2.JPEG\n", r"val\.txt, line 2: '2\.JPEG' must be"),
        ("val.txt", "1.JPEG 0\n2.JPEG 1\n1.JPEG 1\n", r"val\.txt, line 3: '1\.JPEG' has a different class on an earlier line"),
        ("val.txt", "3.JPEG 0\n", r"val\.txt has no label for 2 of the 2 images in .*val, the first is 1\.JPEG"),
        ("labels.csv", "name,class\n1.JPEG,tench\n", r"labels\.csv, line 2: '1\.JPEG,tench' must be"),
        (
            "ILSVRC2012_validation_ground_truth.txt",
            "490\n361\n",
            r"must be in one of val\.txt, .* have a different order and cannot be used",
        ),
    ],
)
def test_an_invalid_label_file_for_imagenet_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    touch(tmp_path / "val/1.JPEG", tmp_path / "val/2.JPEG")
    (tmp_path / name).write_text(text)
    with pytest.raises(DfkdError, match=message) as caught:
        list_test_images("imagenet", tmp_path)
    assert "\n" not in str(caught.value)


JUNK = ("._1.png", ".1.png", ".DS_Store", "Thumbs.db", "desktop.ini", "notes.txt", ".ipynb_checkpoints/1-checkpoint.png")


@pytest.mark.parametrize("name", ["folder", "imagenet", "places365"])
def test_files_and_folders_of_other_programs_are_ignored(tmp_path: Path, name: str) -> None:
    classes = {"folder": ("a", "b"), "imagenet": ("n01440764", "n01443537"), "places365": ("place0", "place1")}[name]
    write_places365(tmp_path, None)
    (tmp_path / "val").mkdir()
    if name == "places365":
        for category in categories():
            (tmp_path / "val" / "-".join(category.split("/")[2:])).mkdir()
    touch(*(tmp_path / "val" / folder / file for folder in classes for file in ("1.PNG", "2.jpeg", *JUNK)))
    touch(*(tmp_path / "val" / folder / "1.png" for folder in (".ipynb_checkpoints", ".Trash-1000", "__MACOSX", "@eaDir", "lost+found")))
    touch(tmp_path / "val/.DS_Store", tmp_path / "val/stray.png")
    image_list = list_test_images(name, tmp_path)
    assert [str(path.relative_to(tmp_path / "val")) for path in image_list.paths] == [
        f"{folder}/{file}" for folder in classes for file in ("1.PNG", "2.jpeg")
    ]
    assert image_list.labels == (0, 0, 1, 1)


def test_symbolic_links_are_followed_and_folders_with_an_image_extension_are_searched(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere/cats/1.png", tmp_path / "val/b/old.png/2.png")
    (tmp_path / "val/a").symlink_to(tmp_path / "elsewhere/cats")
    (tmp_path / "val/b/3.png").symlink_to(tmp_path / "elsewhere/cats/1.png")
    (tmp_path / "val/b/more").symlink_to(tmp_path / "elsewhere/cats")
    (tmp_path / "val/broken").symlink_to(tmp_path / "nowhere")
    image_list = list_test_images("folder", tmp_path)
    assert [str(path.relative_to(tmp_path / "val")) for path in image_list.paths] == [
        "a/1.png",
        "b/3.png",
        "b/more/1.png",
        "b/old.png/2.png",
    ]
    assert (image_list.labels, image_list.classes) == ((0, 1, 1, 1), 2)


def test_a_link_to_a_parent_folder_does_not_duplicate_images(tmp_path: Path) -> None:
    touch(tmp_path / "val/a/1.png", tmp_path / "val/b/below/2.png")
    (tmp_path / "val/a/again").symlink_to(".")
    (tmp_path / "val/b/below/above").symlink_to("../..")
    image_list = list_test_images("folder", tmp_path)
    assert ([path.name for path in image_list.paths], image_list.labels) == (["1.png", "2.png"], (0, 1))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_read_permission_is_named(tmp_path: Path) -> None:
    touch(tmp_path / "val/a/1.png", tmp_path / "val/b/1.png")
    (tmp_path / "val/b").chmod(0)
    with pytest.raises(DfkdError, match=r"val/b cannot be read: \[Errno 13\]"):
        list_test_images("folder", tmp_path)


def categories() -> list[str]:
    names = [f"/x/place{number}" for number in range(DATA_SETS["places365"].classes or 0)]
    names[5], names[6] = "/a/apartment_building/outdoor", "/a/arch"
    return names


def write_places365(root: Path, listed: str | None) -> None:
    numbered = [f"{name} {label}" for label, name in enumerate(categories())]
    (root / "categories_places365.txt").write_text("\n".join(numbered) + "\n")
    if listed is not None:
        (root / "places365_val.txt").write_text(listed)


@pytest.mark.parametrize("folder", ["val_256", "val_large"])
def test_places365_takes_its_labels_from_places365_val(tmp_path: Path, folder: str) -> None:
    write_places365(tmp_path, "Places365_val_00000001.jpg 165\nPlaces365_val_00000002.jpg 6\n")
    (tmp_path / folder).mkdir()
    image_list = list_test_images("places365", tmp_path)
    assert image_list.paths == tuple(tmp_path / folder / f"Places365_val_0000000{number}.jpg" for number in (1, 2))
    assert (image_list.labels, image_list.classes) == ((165, 6), 365)
    assert "of the 36,500" in str(image_list.note)


@pytest.mark.parametrize("nested", [False, True])
def test_places365_in_category_folders_takes_its_labels_from_the_category_file(tmp_path: Path, nested: bool) -> None:
    write_places365(tmp_path, None)
    for name in categories():
        parts = name.strip("/").split("/")
        (tmp_path / "val" / (Path(*parts) if nested else Path("-".join(parts[1:])))).mkdir(parents=True)
    where = tmp_path / "val" / ("a/apartment_building/outdoor" if nested else "apartment_building-outdoor")
    touch(where / "1.jpg")
    image_list = list_test_images("places365", tmp_path)
    assert (image_list.paths, image_list.labels) == ((where / "1.jpg",), (5,))


@pytest.mark.parametrize(
    ("listed", "message"), [("a.jpg 365\n", "class numbers are 365 to 365, must be 0 to 364"), ("a.jpg\n", "line 1: 'a.jpg' must be")]
)
def test_places365_with_an_invalid_list_is_refused(tmp_path: Path, listed: str, message: str) -> None:
    write_places365(tmp_path, listed)
    (tmp_path / "val_256").mkdir()
    with pytest.raises(DfkdError, match=message):
        list_test_images("places365", tmp_path)


def test_paths_in_a_list_are_relative_to_the_list(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("one image.jpg 3\n\nsub/two.png 0\n")
    image_list = list_test_images("list", tmp_path / "list.txt")
    assert image_list.paths == (tmp_path / "one image.jpg", tmp_path / "sub/two.png")
    assert (image_list.labels, image_list.classes) == ((3, 0), 4)


@pytest.mark.parametrize(
    ("content", "files", "labels"),
    [
        pytest.param(b"a.png 1\r\nb.png 0\r\n", ("a.png", "b.png"), (1, 0), id="Windows' line ends"),
        pytest.param(b"\xef\xbb\xbfa.png 1\n", ("a.png",), (1,), id="a mark of UTF-8 in front"),
        pytest.param(b"a.png\t1\nb.png  \t 0", ("a.png", "b.png"), (1, 0), id="tabs, no last line end"),
        pytest.param("ä b.png 1\n".encode(), ("ä b.png",), (1,), id="blanks and letters beyond ASCII"),
        pytest.param("a\u2028b\x0c.png 1\n".encode(), ("a\u2028b\x0c.png",), (1,), id="characters that only look like line ends"),
        pytest.param(b"../a.png 1\n/tmp/b.png 007\n", ("../a.png", "/tmp/b.png"), (1, 7), id="other folders, zeros in front"),
    ],
)
def test_lists_of_other_programs_are_read(tmp_path: Path, content: bytes, files: tuple[str, ...], labels: tuple[int, ...]) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    image_list = list_test_images("list", tmp_path / "list.txt")
    assert (image_list.paths, image_list.labels) == (tuple(tmp_path / name for name in files), labels)
    assert image_list.note is None


def test_duplicate_lines_in_a_list_are_noted(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.png 0\nb.png 1\na.png 0\n")
    image_list = list_test_images("list", tmp_path / "list.txt")
    assert len(image_list) == 3
    assert "has 1 duplicate lines" in str(image_list.note)


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("folder", [], "has no folder val or test"),
        ("folder", ["val/image.jpg"], "has no folders, one per class is expected"),
        ("folder", ["val/a/notes.txt"], "contains no images"),
        ("imagenet", ["val/ILSVRC2012_val_00000001.JPEG"], "has images but no class folders"),
        ("imagenet", ["val/.DS_Store"], "has no folders, one per class is expected"),
        ("places365", ["val_256/a.jpg"], "categories_places365.txt cannot be read"),
        ("list", ["val/a/1.jpg"], "cannot be read"),
    ],
)
def test_an_unsupported_layout_is_refused_in_one_line(tmp_path: Path, name: str, files: list[str], message: str) -> None:
    touch(*(tmp_path / path for path in files))
    with pytest.raises(DfkdError, match=message) as caught:
        list_test_images(name, tmp_path)
    assert "\n" not in str(caught.value)
