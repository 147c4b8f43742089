"""Images with per-pixel labels: cropping, flipping and batching keep labels and pixels aligned."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from dfkd_fast.data import Augment, DataSettings, SegmentationDataset, batches, evaluation_batches, open_split, palette
from dfkd_fast.data.splits import SegmentationBatches
from dfkd_fast.labels import IGNORE_INDEX
from tests.data.draws import check_draws

CPU = torch.device("cpu")
SIZES = [(9, 12), (20, 9), (12, 9), (9, 12), (9, 12)]


def labeled_image(index: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Returns an image and labels that encode the position of every pixel; the last column is unlabeled."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    labels = (10 * rows + columns).masked_fill(columns == width - 1, IGNORE_INDEX).short()
    return torch.stack([rows, columns, torch.full_like(rows, index)]).byte(), labels


def split(crop: int | None = None, augment: Augment = "none", sizes: list[tuple[int, int]] = SIZES) -> SegmentationDataset:
    images, labels = zip(*(labeled_image(index, *size) for index, size in enumerate(sizes)), strict=True)
    return SegmentationDataset(images, labels, (0.0,) * 3, (1.0,) * 3, crop=crop, augment=augment)


def decode_positions(images: Tensor) -> Tensor:
    """Returns the encoded row, column and image number of every pixel, (B, 3, H, W)."""
    return (255 * images).round().long()


def check_labels(images: Tensor, labels: Tensor) -> None:
    rows, columns, index = decode_positions(images).unbind(1)
    widths = torch.tensor([width for _, width in SIZES])[index]
    assert torch.equal(labels, (10 * rows + columns).masked_fill(columns == widths - 1, IGNORE_INDEX))


@pytest.mark.parametrize("augment", ["none", "shift", "shift_flip"])
def test_crops_are_contiguous_squares_aligned_with_their_labels(augment: Augment) -> None:
    torch.manual_seed(0)
    indices = [0, 1, 2, 3, 4, 1] * 10
    images, labels = split(6, augment).__getitems__(indices)
    assert (images.shape, labels.shape) == ((60, 3, 6, 6), (60, 6, 6))
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    check_labels(images, labels)
    rows, columns, number = decode_positions(images).unbind(1)
    assert number.flatten(1).unique(dim=1).flatten().tolist() == indices
    assert (rows.diff(dim=1) == 1).all()
    assert (rows.diff(dim=2) == 0).all()
    steps = columns.diff(dim=2).flatten(1)
    assert (steps == steps[:, :1]).all()
    assert set(steps.unique().tolist()) == ({-1, 1} if augment == "shift_flip" else {1})


def test_without_augmentation_the_center_is_cropped() -> None:
    images, _ = split(6).__getitems__([0, 1, 1])
    rows, columns, _ = decode_positions(images).unbind(1)
    assert rows[:, 0, 0].tolist() == [1, 7, 7]
    assert columns[:, 0, 0].tolist() == [3, 1, 1]


def test_random_crops_are_uniform_and_half_are_mirrored() -> None:
    torch.manual_seed(0)
    images, _ = split(6, "shift_flip").__getitems__([0] * 4000)
    rows, columns, _ = decode_positions(images).unbind(1)
    mirrored = columns[:, 0, 0] > columns[:, 0, 1]
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.03)
    corners = 7 * rows[:, 0, 0] + torch.minimum(columns[:, 0, 0], columns[:, 0, -1])
    counts = corners.bincount(minlength=28)
    assert len(counts) == 28  # 9 − 6 + 1 rows, 12 − 6 + 1 columns
    assert 90 < counts.min() <= counts.max() < 200


def test_a_crop_as_large_as_the_image_is_the_image() -> None:
    torch.manual_seed(0)
    whole, labels = split(9, "shift", [(9, 9)]).__getitems__([0, 0])
    assert torch.equal(decode_positions(whole[1]), labeled_image(0, 9, 9)[0].long())
    assert torch.equal(labels[1], labeled_image(0, 9, 9)[1].long())


def test_images_are_normalized_per_channel() -> None:
    image, labels = labeled_image(3, 9, 12)
    mean, std = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.5, 3.0])
    loaded, _ = SegmentationDataset([image], [labels], mean.tolist(), std.tolist())[0]
    torch.testing.assert_close(loaded, (image / 255 - mean[:, None, None]) / std[:, None, None])


def test_crops_are_reproducible_with_the_seed_and_differ_between_accesses() -> None:
    check_draws(split(6, "shift_flip"))


def test_a_loader_returns_every_image_once_per_epoch_in_the_generators_order() -> None:
    def numbers(seed: int) -> list[int]:
        loader = batches(split(6, "shift"), 3, shuffle=True, generator=torch.Generator().manual_seed(seed))
        return [int(number) for images, _ in loader for number in decode_positions(images)[:, 2, 0, 0]]

    assert numbers(0) == numbers(0)
    assert len({tuple(numbers(seed)) for seed in range(5)}) > 1
    assert sorted(numbers(3)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("batch_size", "sizes"), [(2, [2, 2]), (3, [3, 2]), (5, [5]), (4, [4])])
def test_a_last_batch_of_one_image_is_dropped_in_training_only(batch_size: int, sizes: list[int]) -> None:
    images = split(6, "shift")
    assert [len(labels) for _, labels in batches(images, batch_size, shuffle=True)] == sizes
    assert sum(len(labels) for _, labels in batches(images, batch_size)) == len(images)


@pytest.mark.parametrize(
    ("batch_size", "expected"), [(2, [[0, 3], [4], [1], [2]]), (5, [[0, 3, 4], [1], [2]]), (1, [[0], [3], [4], [1], [2]])]
)
def test_whole_images_are_batched_by_size(batch_size: int, expected: list[list[int]]) -> None:
    loaded = SegmentationBatches(split(), batch_size, [])
    for _ in range(2):
        assert [decode_positions(images)[:, 2, 0, 0].tolist() for images, _ in loaded] == expected
    assert len(loaded) == len(expected)
    assert loaded.count == 5
    for images, labels in loaded:
        assert images.shape[-2:] == SIZES[int(decode_positions(images)[0, 2, 0, 0])]
        check_labels(images, labels)


def test_loading_whole_images_does_not_change_the_global_random_state() -> None:
    before = torch.get_rng_state()
    list(SegmentationBatches(split(), 2, []))
    assert torch.equal(torch.get_rng_state(), before)


def shapes(**changes: Any) -> DataSettings:
    return DataSettings(name="shapes", num_classes=4, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3, image_size=16, **changes)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("subset", [0, 50])
def test_the_processes_shares_are_disjoint_and_complete(world_size: int, subset: int) -> None:
    def images(rank: int, world_size: int) -> list[bytes]:
        loaded = evaluation_batches(shapes(subset=subset, batch_size=8), CPU, rank=rank, world_size=world_size)
        return [image.numpy().tobytes() + label.numpy().tobytes() for batch in loaded for image, label in zip(*batch, strict=True)]

    shares = [images(rank, world_size) for rank in range(world_size)]
    assert sorted(image for share in shares for image in share) == sorted(images(0, 1))
    assert sum(map(len, shares)) == (subset or 128)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def drawn(split: Any, size: int = 32) -> tuple[Tensor, Tensor]:
    settings = DataSettings(name="shapes", num_classes=4, channels=3, mean=(0.0,) * 3, std=(1.0,) * 3, image_size=size)
    data: Any = open_split(settings, split)
    return data.__getitems__(list(range(len(data))))


def test_shapes_are_deterministic_and_differ_between_training_and_test() -> None:
    (images, labels), (again, _), (others, _) = drawn("train"), drawn("train"), drawn("test")
    assert (images.shape, labels.shape, others.shape) == ((512, 3, 32, 32), (512, 32, 32), (128, 3, 32, 32))
    assert torch.equal(images, again)
    assert not torch.equal(images[:128], others)


def test_shapes_have_their_classs_colour_with_noise() -> None:
    images, labels = drawn("train")
    pixels = 255 * images.movedim(1, -1)
    for label, colour in enumerate(palette(shapes()).float()):
        torch.testing.assert_close(pixels[labels == label].mean(dim=0), colour, rtol=0, atol=10)
        assert (pixels[labels == label].std(dim=0) > 20).all()


@pytest.mark.parametrize(("label", "share"), [(1, np.pi / 4), (2, 1.0), (3, 0.5)])
def test_labels_have_the_geometry_of_their_shapes(label: int, share: float) -> None:
    covered = []
    for labels in drawn("test", 64)[1].numpy():
        mask = labels == label
        covered += [mask[box].mean() for box in ndimage.find_objects(ndimage.label(mask)[0])]
    assert np.median(covered) == pytest.approx(share, abs=0.05)  # of its bounding box; most shapes are not covered by another
