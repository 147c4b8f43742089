"""Image files loaded by torchvision and by DALI: the same pixels, the same count, and broken files are detected."""

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
from dfkd_fast.data.headers import decodes_identically
from dfkd_fast.errors import DfkdError
from tests.image_files import BROKEN, ODD, PLAIN, jpeg, noise, write_folder

CPU = torch.device("cpu")
TRANSFORM = EvalTransform(resize=32, crop=28, interpolation="bilinear", mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))
HAS_DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="nvidia-dali is not installed")
LOADERS = ["torchvision", pytest.param("dali", marks=needs_dali)]


def open_batches(loader: str, image_list: ImageList, batch_size: int = 4, transform: EvalTransform = TRANSFORM) -> Batches:
    if loader == "dali":
        return DaliBatches(image_list, transform, batch_size, 1, CPU, torch.float32)
    return FolderBatches(image_list, transform, batch_size, 0)


def collect(batches: Batches) -> tuple[Tensor, list[int]]:
    loaded = [(images.clone(), labels) for images, labels in batches]  # DALI overwrites a batch by the next one
    return torch.cat([images for images, _ in loaded]), torch.cat([labels for _, labels in loaded]).tolist()


def expected(path: Path, transform: EvalTransform = TRANSFORM) -> Tensor:
    """Returns the image as preprocessed by PIL and torchvision."""
    resize = transforms.Resize(transform.resize, transforms.InterpolationMode(transform.interpolation))
    image = transforms.CenterCrop(transform.crop)(resize(Image.open(path).convert("RGB")))
    pixels = np.asarray(image).astype(np.float64) / 255
    return torch.from_numpy(((pixels - np.array(transform.mean)) / np.array(transform.std)).transpose(2, 0, 1))


def levels(ours: Tensor, theirs: Tensor, transform: EvalTransform = TRANSFORM) -> Tensor:
    """Returns absolute differences in 8-bit steps."""
    return (ours.double() - theirs.double()).abs() * 255 * torch.tensor(transform.std)[:, None, None]


@pytest.mark.parametrize("content", PLAIN.values(), ids=PLAIN)
def test_common_files_decode_identically(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert decodes_identically(tmp_path / "file")


@pytest.mark.parametrize("content", [*ODD.values(), *BROKEN.values()], ids=[*ODD, *BROKEN])
def test_unusual_and_broken_files_do_not_decode_identically(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert not decodes_identically(tmp_path / "file")


def test_truncated_files_do_not_decode_identically(tmp_path: Path) -> None:
    for name in ("jpeg", "png"):
        for length in range(0, len(PLAIN[name]), 7):
            (tmp_path / "file").write_bytes(PLAIN[name][:length])
            assert not decodes_identically(tmp_path / "file")
    assert not decodes_identically(tmp_path / "absent")


@pytest.mark.parametrize("loader", LOADERS)
def test_every_kind_of_file_is_decoded_as_by_pil_whatever_its_extension(tmp_path: Path, loader: str) -> None:
    write_folder(tmp_path, PLAIN | ODD)
    image_list = list_test_images("folder", tmp_path)
    images, labels = collect(open_batches(loader, image_list))
    order = sorted(range(len(image_list)), key=lambda i: (loader == "dali" and not decodes_identically(image_list.paths[i]), i))
    assert labels == [image_list.labels[index] for index in order]
    for image, index in zip(images, order, strict=True):
        assert levels(image, expected(image_list.paths[index])).max() < 1.01, image_list.paths[index].name


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("loader", LOADERS)
def test_resize_and_crop_equal_torchvisions_at_every_size(tmp_path: Path, loader: str, interpolation: Interpolation) -> None:
    # Odd and even margins, halves that Python rounds up and down, sides that are rounded down, images that are upscaled.
    sizes = [(32, 32), (33, 61), (61, 33), (47, 50), (50, 47), (64, 67), (67, 65), (20, 31), (97, 300), (301, 98), (40, 43), (43, 41)]
    write_folder(tmp_path, {f"{height}x{width}": jpeg(noise(height, width, height * width)) for height, width in sizes})
    transform = TRANSFORM._replace(interpolation=interpolation)
    image_list = list_test_images("folder", tmp_path)
    images, _ = collect(open_batches(loader, image_list, 5, transform))
    for image, path in zip(images, image_list.paths, strict=True):
        difference = levels(image, expected(path, transform))
        # Bicubic overshoots are clipped twice by PIL, so a few pixels differ by more than rounding.
        assert difference.max() < (1.01 if interpolation == "bilinear" or loader == "torchvision" else 12), path.name
        assert difference.mean() < 0.5, path.name


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(("count", "batch_size"), [(7, 3), (6, 3), (1, 4), (5, 1)])
def test_every_file_is_loaded_once_per_pass(tmp_path: Path, loader: str, count: int, batch_size: int) -> None:
    (tmp_path / "list.txt").write_text("".join(f"{number}.jpg {number}\n" for number in range(count)))
    for number in range(count):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(noise(40, 40, number)))
    batches = open_batches(loader, list_test_images("list", tmp_path / "list.txt"), batch_size)
    passes = [collect(batches) for _ in range(3)]
    next(iter(batches))  # an interrupted pass
    for images, labels in [*passes, collect(batches)]:
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
    image_list = list_test_images("folder", tmp_path)
    images, _ = collect(open_batches(loader, image_list))
    matches = [path for image in images for path in image_list.paths if levels(image, expected(path)).max() < 1.01]
    assert sorted(matches) == sorted(image_list.paths)


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_files_above_pils_pixel_limit_do_not_decode_identically(tmp_path: Path, kind: str) -> None:
    content = bytearray(PLAIN[kind])
    # Height 60 and width 80, in the order of the header.
    width = 2 if kind == "jpeg" else 4
    sizes = [side.to_bytes(width, "big") for side in ((60, 80) if kind == "jpeg" else (80, 60))]
    offset = content.index(b"".join(sizes))
    content[offset : offset + 2 * width] = (9_999).to_bytes(width, "big") * 2
    (tmp_path / "file").write_bytes(content)
    assert not decodes_identically(tmp_path / "file")


@needs_dali
def test_dalis_batch_size_is_limited_to_the_number_of_files(tmp_path: Path) -> None:
    write_folder(tmp_path, {"one": jpeg(noise(40, 50))})
    batches = open_batches("dali", list_test_images("folder", tmp_path), 2**31 - 1)
    assert len(collect(batches)[1]) == len(batches) == 1


@needs_dali
def test_dali_returns_half_precision_if_requested(tmp_path: Path) -> None:
    write_folder(tmp_path, {"one": jpeg(noise(40, 50))})
    image_list = list_test_images("folder", tmp_path)
    ((half, _),) = [(images.clone(), labels) for images, labels in DaliBatches(image_list, TRANSFORM, 2, 1, CPU, torch.float16)]
    full, _ = collect(open_batches("dali", image_list))
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), full, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("loader", LOADERS)
def test_unreadable_files_are_left_out_and_listed_with_the_reason(tmp_path: Path, loader: str) -> None:
    write_folder(tmp_path, PLAIN | BROKEN)
    batches = open_batches(loader, list_test_images("folder", tmp_path), 3)
    for _ in range(2):
        images, _ = collect(batches)
        assert len(images) == len(PLAIN)
        assert sorted(Path(line.partition(".jpg")[0]).name for line in batches.unreadable) == sorted(BROKEN)
    assert any("empty.jpg (is empty)" in line for line in batches.unreadable)
    assert any("truncated.jpg (image file is truncated" in line for line in batches.unreadable)


@needs_dali
def test_files_that_dali_fails_to_decode_are_read_by_pil(tmp_path: Path) -> None:
    # Valid at its beginning and end, but with corrupted compressed data in the middle.
    broken = bytearray(PLAIN["png"])
    broken[len(broken) // 2] ^= 0xFF
    write_folder(tmp_path, {f"{number}": PLAIN["jpeg"] for number in range(6)} | {"corrupted": bytes(broken)}, classes=1)
    batches = open_batches("dali", list_test_images("folder", tmp_path), 2)
    for _ in range(2):
        images, _ = collect(batches)
        assert len(images) == 6
        assert [Path(line.partition(".jpg")[0]).name for line in batches.unreadable] == ["corrupted"]


@needs_dali
def test_grayscale_images_are_read_by_torchvision_instead_of_dali(tmp_path: Path) -> None:
    write_folder(tmp_path, {"one": jpeg(noise(40, 50))}, classes=2)
    settings = {"root": str(tmp_path), "num_classes": 2, "channels": 1, "image_size": 28}
    logged: list[str] = []
    assert isinstance(evaluation_batches(DataSettings(name="folder", **settings), CPU, log=logged.append), FolderBatches)  # type: ignore[arg-type]
    assert "grayscale" in logged[0]
    with pytest.raises(DfkdError, match="grayscale"):
        evaluation_batches(DataSettings(name="folder", loader="dali", **settings), CPU)  # type: ignore[arg-type]


def test_without_dali_images_are_read_by_torchvision_and_a_line_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfkd_fast.data.dali.importlib.util.find_spec", lambda name: None)
    write_folder(tmp_path, {"one": jpeg(noise(40, 50))})
    colour = {"channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    logged: list[str] = []
    settings = DataSettings(name="folder", root=str(tmp_path), num_classes=2, **colour)  # type: ignore[arg-type]
    assert isinstance(evaluation_batches(settings, CPU, log=logged.append), FolderBatches)
    assert logged == ["DALI is not installed (pip install nvidia-dali-cuda130): images are read by torchvision"]
    with pytest.raises(DfkdError, match="loader 'dali': DALI is not installed"):
        evaluation_batches(DataSettings(name="folder", root=str(tmp_path), num_classes=2, loader="dali", **colour), CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("subset", [0, 100])
def test_the_processes_shares_are_disjoint_and_complete(world_size: int, subset: int) -> None:
    settings = DataSettings(name="digits", image_size=8, batch_size=64, subset=subset)
    shares = [
        [image.numpy().tobytes() for images, _ in evaluation_batches(settings, CPU, rank=rank, world_size=world_size) for image in images]
        for rank in range(world_size)
    ]
    whole = [image.numpy().tobytes() for images, _ in evaluation_batches(settings, CPU) for image in images]
    assert sorted(image for share in shares for image in share) == sorted(whole)
    assert len(whole) == (subset or 450)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_subset_is_deterministic_and_has_all_classes() -> None:
    settings = DataSettings(name="digits", image_size=8, subset=60)
    first, again = ([labels.tolist() for _, labels in evaluation_batches(settings, CPU)] for _ in range(2))
    assert first == again
    assert set(first[0]) == set(range(10))
    with pytest.raises(DfkdError, match=r"data.subset = 451: must be at most 450, the number of test images"):
        evaluation_batches(DataSettings(name="digits", subset=451), CPU)
