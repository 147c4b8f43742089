"""Image files through torchvision and through DALI: the same pixels, the same count, and broken ones are found."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from dfkd_fast.data import (
    Batches,
    DaliBatches,
    DataSettings,
    EvalTransform,
    FolderBatches,
    ImageList,
    Interpolation,
    evaluation_batches,
    list_test_images,
)
from dfkd_fast.data.headers import is_plain
from dfkd_fast.errors import DfkdError
from tests.pictures import BROKEN, ODD, PLAIN, jpeg, noise, write_folder

CPU = torch.device("cpu")
VIEW = EvalTransform(resize=32, crop=28, interpolation="bilinear", mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))
HAS_DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="nvidia-dali is not installed")
LOADERS = ["torchvision", pytest.param("dali", marks=needs_dali)]


def open_batches(loader: str, listing: ImageList, batch_size: int = 4, view: EvalTransform = VIEW) -> Batches:
    if loader == "dali":
        return DaliBatches(listing, view, batch_size, 1, CPU, torch.float32)
    return FolderBatches(listing, view, batch_size, 0)


def seen(batches: Batches) -> tuple[Tensor, list[int]]:
    served = [(images.clone(), labels) for images, labels in batches]  # a batch of DALI's lives until the next
    return torch.cat([images for images, _ in served]), torch.cat([labels for _, labels in served]).tolist()


def expected(path: Path, view: EvalTransform = VIEW) -> Tensor:
    """By PIL and torchvision, written out."""
    resize = transforms.Resize(view.resize, transforms.InterpolationMode(view.interpolation))
    picture = transforms.CenterCrop(view.crop)(resize(Image.open(path).convert("RGB")))
    pixels = np.asarray(picture).astype(np.float64) / 255
    return torch.from_numpy(((pixels - np.array(view.mean)) / np.array(view.std)).transpose(2, 0, 1))


def levels(ours: Tensor, theirs: Tensor, view: EvalTransform = VIEW) -> Tensor:
    """Differences in steps of a byte."""
    return (ours.double() - theirs.double()).abs() * 255 * torch.tensor(view.std)[:, None, None]


@pytest.mark.parametrize("content", PLAIN.values(), ids=PLAIN)
def test_ordinary_files_are_plain(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert is_plain(tmp_path / "file")


@pytest.mark.parametrize("content", [*ODD.values(), *BROKEN.values()], ids=[*ODD, *BROKEN])
def test_odd_and_broken_files_are_not(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert not is_plain(tmp_path / "file")


def test_no_prefix_of_a_file_is_plain(tmp_path: Path) -> None:
    for name in ("jpeg", "png"):
        for length in range(0, len(PLAIN[name]), 7):
            (tmp_path / "file").write_bytes(PLAIN[name][:length])
            assert not is_plain(tmp_path / "file")
    assert not is_plain(tmp_path / "absent")


@pytest.mark.parametrize("loader", LOADERS)
def test_every_kind_of_file_looks_as_pil_reads_it_whatever_it_is_called(tmp_path: Path, loader: str) -> None:
    write_folder(tmp_path, PLAIN | ODD)
    listing = list_test_images("folder", tmp_path)
    images, labels = seen(open_batches(loader, listing))
    order = sorted(range(len(listing)), key=lambda i: (loader == "dali" and not is_plain(listing.paths[i]), i))
    assert labels == [listing.labels[index] for index in order]
    for image, index in zip(images, order, strict=True):
        assert levels(image, expected(listing.paths[index])).max() < 1.01, listing.paths[index].name


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("loader", LOADERS)
def test_the_geometry_is_torchvisions_at_every_size(tmp_path: Path, loader: str, interpolation: Interpolation) -> None:
    # Odd and even margins, both halves that Python's round() knows, sides that are cut short, images that are enlarged.
    sizes = [(32, 32), (33, 61), (61, 33), (47, 50), (50, 47), (64, 67), (67, 65), (20, 31), (97, 300), (301, 98), (40, 43), (43, 41)]
    write_folder(tmp_path, {f"{height}x{width}": jpeg(noise(height, width, height * width)) for height, width in sizes})
    view = VIEW._replace(interpolation=interpolation)
    listing = list_test_images("folder", tmp_path)
    images, _ = seen(open_batches(loader, listing, 5, view))
    for image, path in zip(images, listing.paths, strict=True):
        difference = levels(image, expected(path, view))
        # Bicubic overshoots are clipped twice by PIL, so a few pixels differ by more than rounding.
        assert difference.max() < (1.01 if interpolation == "bilinear" or loader == "torchvision" else 12), path.name
        assert difference.mean() < 0.5, path.name


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(("count", "batch_size"), [(7, 3), (6, 3), (1, 4), (5, 1)])
def test_every_file_is_served_once_in_every_pass(tmp_path: Path, loader: str, count: int, batch_size: int) -> None:
    (tmp_path / "list.txt").write_text("".join(f"{number}.jpg {number}\n" for number in range(count)))
    for number in range(count):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(noise(40, 40, number)))
    batches = open_batches(loader, list_test_images("list", tmp_path / "list.txt"), batch_size)
    passes = [seen(batches) for _ in range(3)]
    next(iter(batches))  # a pass that is broken off
    for images, labels in [*passes, seen(batches)]:
        assert labels == list(range(count))
        torch.testing.assert_close(images, passes[0][0])
    assert batches.count == count
    assert len(batches) == -(-count // batch_size)


@pytest.mark.parametrize("loader", LOADERS)
def test_batches_are_channels_last_and_the_last_may_be_smaller(tmp_path: Path, loader: str) -> None:
    write_folder(tmp_path, {str(number): jpeg(noise(40, 50, number)) for number in range(5)})
    sizes = []
    for images, labels in open_batches(loader, list_test_images("folder", tmp_path), 3):
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert images.dtype == torch.float32
        sizes.append((len(images), len(labels)))
    assert sizes == [(3, 3), (2, 2)]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", [b"\xff.jpg", b"a\nb.jpg", "ä\u2028'\"$.jpg".encode(), b"-.jpg", b"a" * 250 + b".jpg"])
def test_files_may_have_any_name(tmp_path: Path, loader: str, name: bytes) -> None:
    write_folder(tmp_path, {"one": jpeg(noise(40, 50)), "two": jpeg(noise(40, 50, 1))}, classes=1)
    (tmp_path / "val/a/two.jpg").rename(tmp_path / "val/a" / os.fsdecode(name))
    listing = list_test_images("folder", tmp_path)
    images, _ = seen(open_batches(loader, listing))
    found = [path for image in images for path in listing.paths if levels(image, expected(path)).max() < 1.01]
    assert sorted(found) == sorted(listing.paths)


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_files_of_more_pixels_than_pil_trusts_are_not_plain(tmp_path: Path, kind: str) -> None:
    content = bytearray(PLAIN[kind])
    # A height of 60 and a width of 80, as the header has them.
    width = 2 if kind == "jpeg" else 4
    sizes = [side.to_bytes(width, "big") for side in ((60, 80) if kind == "jpeg" else (80, 60))]
    place = content.index(b"".join(sizes))
    content[place : place + 2 * width] = (9_999).to_bytes(width, "big") * 2
    (tmp_path / "file").write_bytes(content)
    assert not is_plain(tmp_path / "file")


@needs_dali
def test_a_batch_of_dalis_needs_no_room_for_more_files_than_there_are(tmp_path: Path) -> None:
    write_folder(tmp_path, {"one": jpeg(noise(40, 50))})
    batches = open_batches("dali", list_test_images("folder", tmp_path), 2**31 - 1)
    assert len(seen(batches)[1]) == len(batches) == 1


@needs_dali
def test_dali_gives_half_precision_without_a_copy(tmp_path: Path) -> None:
    write_folder(tmp_path, {"one": jpeg(noise(40, 50))})
    listing = list_test_images("folder", tmp_path)
    ((half, _),) = [(images.clone(), labels) for images, labels in DaliBatches(listing, VIEW, 2, 1, CPU, torch.float16)]
    full, _ = seen(open_batches("dali", listing))
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), full, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("loader", LOADERS)
def test_files_that_cannot_be_read_are_left_out_counted_and_named_with_the_reason(tmp_path: Path, loader: str) -> None:
    write_folder(tmp_path, PLAIN | BROKEN)
    batches = open_batches(loader, list_test_images("folder", tmp_path), 3)
    for _ in range(2):
        images, _ = seen(batches)
        assert len(images) == len(PLAIN)
        assert sorted(Path(line.partition(".jpg")[0]).name for line in batches.unreadable) == sorted(BROKEN)
    assert any("empty.jpg (is empty)" in line for line in batches.unreadable)
    assert any("truncated.jpg (image file is truncated" in line for line in batches.unreadable)


@needs_dali
def test_what_dali_does_not_decode_after_all_is_read_by_pil(tmp_path: Path) -> None:
    # Plain by its header and its end, but a hole in the middle of a PNG's compressed data.
    broken = bytearray(PLAIN["png"])
    broken[len(broken) // 2] ^= 0xFF
    write_folder(tmp_path, {f"{number}": PLAIN["jpeg"] for number in range(6)} | {"hole": bytes(broken)}, classes=1)
    batches = open_batches("dali", list_test_images("folder", tmp_path), 2)
    for _ in range(2):
        images, _ = seen(batches)
        assert len(images) == 6
        assert [Path(line.partition(".jpg")[0]).name for line in batches.unreadable] == ["hole"]


@needs_dali
def test_dali_leaves_grey_networks_to_torchvision(tmp_path: Path) -> None:
    write_folder(tmp_path, {"one": jpeg(noise(40, 50))}, classes=2)
    settings = {"root": str(tmp_path), "num_classes": 2, "channels": 1, "image_size": 28}
    said: list[str] = []
    assert isinstance(evaluation_batches(DataSettings(name="folder", **settings), CPU, log=said.append), FolderBatches)  # type: ignore[arg-type]
    assert "grey" in said[0]
    with pytest.raises(DfkdError, match="grey"):
        evaluation_batches(DataSettings(name="folder", loader="dali", **settings), CPU)  # type: ignore[arg-type]


def test_without_dali_torchvision_reads_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfkd_fast.data.dali.importlib.util.find_spec", lambda name: None)
    write_folder(tmp_path, {"one": jpeg(noise(40, 50))})
    colour = {"channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    said: list[str] = []
    wanted = DataSettings(name="folder", root=str(tmp_path), num_classes=2, **colour)  # type: ignore[arg-type]
    assert isinstance(evaluation_batches(wanted, CPU, log=said.append), FolderBatches)
    assert said == ["DALI is not installed (pip install nvidia-dali-cuda130): images are read by torchvision"]
    with pytest.raises(DfkdError, match="loader 'dali': DALI is not installed"):
        evaluation_batches(DataSettings(name="folder", root=str(tmp_path), num_classes=2, loader="dali", **colour), CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("subset", [0, 100])
def test_the_processes_shares_are_all_images_once(world_size: int, subset: int) -> None:
    wanted = DataSettings(name="digits", image_size=8, batch_size=64, subset=subset)
    shares = [
        [image.numpy().tobytes() for images, _ in evaluation_batches(wanted, CPU, rank=rank, world_size=world_size) for image in images]
        for rank in range(world_size)
    ]
    whole = [image.numpy().tobytes() for images, _ in evaluation_batches(wanted, CPU) for image in images]
    assert sorted(image for share in shares for image in share) == sorted(whole)
    assert len(whole) == (subset or 450)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_subset_is_drawn_from_all_classes_and_always_the_same() -> None:
    wanted = DataSettings(name="digits", image_size=8, subset=60)
    first, again = ([labels.tolist() for _, labels in evaluation_batches(wanted, CPU)] for _ in range(2))
    assert first == again
    assert set(first[0]) == set(range(10))
    with pytest.raises(DfkdError, match=r"data.subset = 451: there are 450 test images"):
        evaluation_batches(DataSettings(name="digits", subset=451), CPU)
