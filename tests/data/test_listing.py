from pathlib import Path

import pytest

from dfkd_fast.data import DATA_SETS, read_listing
from dfkd_fast.errors import DfkdError


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_a_folder_a_class_is_numbered_by_name_and_files_are_sorted(tmp_path: Path) -> None:
    touch(tmp_path / "val/b/2.png", tmp_path / "val/b/1.JPEG", tmp_path / "val/a/x/deep.jpg", tmp_path / "val/a/notes.txt")
    (tmp_path / "val/c").mkdir()
    listing = read_listing("folder", tmp_path)
    assert [path.name for path in listing.paths] == ["deep.jpg", "1.JPEG", "2.png"]
    assert (listing.labels, listing.classes, listing.remark) == ((0, 1, 1), 3, None)


@pytest.mark.parametrize("below", ["val", "."])
def test_imagenets_wordnet_ids_sort_into_its_classes(tmp_path: Path, below: str) -> None:
    touch(*(tmp_path / below / f"n{number:08}" / "image.JPEG" for number in reversed(range(1000))))
    listing = read_listing("imagenet", tmp_path)
    assert listing.labels == tuple(range(1000))
    assert listing.paths[7].parent.name == "n00000007"
    assert listing.remark is not None
    assert "1,000 of the 50,000" in listing.remark


def test_imagenet_has_a_thousand_classes(tmp_path: Path) -> None:
    touch(tmp_path / "val/n01440764/1.JPEG")
    with pytest.raises(DfkdError, match="has 1 class folders, ImageNet has 1000"):
        read_listing("imagenet", tmp_path)


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
def test_places365_takes_its_classes_from_its_own_list(tmp_path: Path, folder: str) -> None:
    write_places365(tmp_path, "Places365_val_00000001.jpg 165\nPlaces365_val_00000002.jpg 6\n")
    (tmp_path / folder).mkdir()
    listing = read_listing("places365", tmp_path)
    assert listing.paths == tuple(tmp_path / folder / f"Places365_val_0000000{number}.jpg" for number in (1, 2))
    assert (listing.labels, listing.classes) == ((165, 6), 365)
    assert "of the 36,500" in str(listing.remark)


@pytest.mark.parametrize("nested", [False, True])
def test_places365_in_folders_takes_its_classes_from_the_category_file(tmp_path: Path, nested: bool) -> None:
    write_places365(tmp_path, None)
    for name in categories():
        parts = name.strip("/").split("/")
        (tmp_path / "val" / (Path(*parts) if nested else Path("-".join(parts[1:])))).mkdir(parents=True)
    where = tmp_path / "val" / ("a/apartment_building/outdoor" if nested else "apartment_building-outdoor")
    touch(where / "1.jpg")
    listing = read_listing("places365", tmp_path)
    assert (listing.paths, listing.labels) == ((where / "1.jpg",), (5,))


@pytest.mark.parametrize(
    ("listed", "message"), [("a.jpg 365\n", "classes run from 365 to 365, allowed are 0 to 364"), ("a.jpg\n", "line 1: 'a.jpg' must be")]
)
def test_places365_with_a_wrong_list_is_refused(tmp_path: Path, listed: str, message: str) -> None:
    write_places365(tmp_path, listed)
    (tmp_path / "val_256").mkdir()
    with pytest.raises(DfkdError, match=message):
        read_listing("places365", tmp_path)


def test_a_list_names_files_beside_it(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("one picture.jpg 3\n\nsub/two.png 0\n")
    listing = read_listing("list", tmp_path / "list.txt")
    assert listing.paths == (tmp_path / "one picture.jpg", tmp_path / "sub/two.png")
    assert (listing.labels, listing.classes) == ((3, 0), 4)


@pytest.mark.parametrize(
    ("name", "made", "message"),
    [
        ("folder", [], "has no folder val or test"),
        ("folder", ["val/image.jpg"], "has no folders, one a class is expected"),
        ("folder", ["val/a/notes.txt"], "no images in it"),
        ("imagenet", ["val/ILSVRC2012_val_00000001.JPEG"], "has no folders"),
        ("places365", ["val_256/a.jpg"], "categories_places365.txt cannot be read"),
        ("list", ["val/a/1.jpg"], "cannot be read"),
    ],
)
def test_what_is_laid_out_otherwise_is_said_in_one_line(tmp_path: Path, name: str, made: list[str], message: str) -> None:
    touch(*(tmp_path / path for path in made))
    with pytest.raises(DfkdError, match=message) as refused:
        read_listing(name, tmp_path)
    assert "\n" not in str(refused.value)
