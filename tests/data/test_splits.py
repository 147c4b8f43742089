import random
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

from dfkd_fast import DfkdError
from dfkd_fast.data import ArraySplit, Augment, batches
from tests.data.draws import check_draws

MEAN, STD = (0.1, 0.5, 0.9), (0.2, 0.5, 3.0)
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def pixels(count: int, height: int, width: int, channels: int = 3) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def split(count: int = 10, *, augment: Augment = "none") -> ArraySplit:
    return ArraySplit(pixels(count, 9, 9), np.arange(count), 9, MEAN, STD, augment=augment)


def order(loaded: Iterable[tuple[Tensor, Tensor]]) -> list[int]:
    return [int(label) for _, labels in loaded for label in labels]


def test_images_are_float32_and_normalized_per_channel() -> None:
    images, labels = split().__getitems__([7, 0, 3])
    expected = (pixels(10, 9, 9)[[7, 0, 3]] / 255 - np.array(MEAN)) / np.array(STD)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert labels.tolist() == [7, 0, 3]
    np.testing.assert_allclose(images.numpy(), expected.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-6)


def test_an_image_is_the_same_by_index_and_in_a_batch() -> None:
    data = split()
    image, label = data[4]
    assert torch.equal(image, data.__getitems__([2, 4])[0][1])
    assert label.item() == 4
    assert len(data) == 10


@pytest.mark.parametrize(("height", "width", "image_size"), [(28, 28, 32), (50, 37, 16), (8, 8, 32)])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_resized_as_by_pillow(height: int, width: int, image_size: int, channels: int) -> None:
    images = pixels(3, height, width, channels)
    data = ArraySplit(images, np.zeros(3, np.int64), image_size, (0.0,) * channels, (1.0,) * channels)
    ours = (255 * data.__getitems__([0, 1, 2])[0]).round().numpy().transpose(0, 2, 3, 1)
    theirs = [np.asarray(Image.fromarray(image.squeeze()).resize((image_size, image_size), Image.Resampling.BILINEAR)) for image in images]
    assert np.abs(ours - np.stack(theirs).reshape(ours.shape)).max() <= 1


def test_arrays_of_any_strides_and_label_dtypes_are_supported() -> None:
    images, labels = pixels(6, 18, 9)[::-1, ::2], np.arange(6, dtype=np.uint8)[::-1]
    loaded, classes = ArraySplit(images, labels, 9, (0.0,) * 3, (1.0,) * 3).__getitems__([0, 5])
    np.testing.assert_array_equal((255 * loaded).round().numpy().transpose(0, 2, 3, 1), images[[0, 5]])
    assert classes.tolist() == [5, 0]


def locate(images: Tensor, original: Tensor, mode: Literal["constant", "reflect"]) -> list[tuple[int, int, bool]]:
    """Returns the position of each image in the original padded by 4 pixels, and whether it is mirrored."""
    padded = np.pad(original.numpy(), ((0, 0), (4, 4), (4, 4)), mode=mode)
    windows = np.lib.stride_tricks.sliding_window_view(padded, original.shape[1:], (1, 2)).transpose(1, 2, 0, 3, 4)
    positions = []
    for image in images.numpy():
        matches = [
            (int(top), int(left), mirrored)
            for mirrored in (False, True)
            for top, left in np.argwhere((windows == (image[..., ::-1] if mirrored else image)).all((2, 3, 4)))
        ]
        assert len(matches) == 1 or (matches and mode == "reflect")  # windows at the reflected borders are their own mirror image
        positions += matches[:1]
    return positions


@pytest.mark.parametrize("mirrored", [{False}, {False, True}])
@pytest.mark.parametrize(("augment", "mode"), [("shift", "constant"), ("reflect", "reflect")])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_augmented_image_is_a_window_of_the_padded_image(
    augment: Any, mode: Literal["constant", "reflect"], mirrored: set[bool], channels: int
) -> None:
    augment += "_flip" if len(mirrored) == 2 else ""
    torch.manual_seed(0)
    image = pixels(1, 9, 9, channels) | 1
    zeros, ones = (0.0,) * channels, (1.0,) * channels
    loaded, _ = ArraySplit(image, np.zeros(1, np.int64), 9, zeros, ones, augment=augment).__getitems__([0] * 300)
    original, _ = ArraySplit(image, np.zeros(1, np.int64), 9, zeros, ones)[0]
    positions = locate(loaded, original, mode)
    assert {top for top, _, _ in positions} == set(range(9))
    assert {left for _, left, _ in positions} == set(range(9))
    assert len({(top, left) for top, left, _ in positions}) > 40
    assert {mirror for _, _, mirror in positions} == mirrored
    if len(mirrored) == 2:
        assert 100 < sum(mirror for _, _, mirror in positions) < 200


@pytest.mark.parametrize(("augment", "values"), [("shift", [-0.5, 1.5]), ("reflect", [1.5])])
def test_the_borders_of_shifted_images_are_black_before_normalization_or_reflected(augment: Augment, values: list[float]) -> None:
    torch.manual_seed(0)
    white = np.full((50, 8, 8, 1), 255, np.uint8)
    images, _ = ArraySplit(white, np.zeros(50, np.int64), 8, (0.25,), (0.5,), augment=augment).__getitems__(list(range(50)))
    assert sorted(set(images.flatten().tolist())) == values


def test_reflected_borders_wider_than_the_images_are_rejected() -> None:
    with pytest.raises(DfkdError, match=r"teacher\.augment = 'reflect_flip': needs images of more than 4 pixels, not 4"):
        ArraySplit(pixels(2, 9, 9), np.arange(2), 4, MEAN, STD, augment="reflect_flip")
    images, _ = ArraySplit(pixels(2, 9, 9), np.arange(2), 5, MEAN, STD, augment="reflect_flip").__getitems__([0, 1])
    assert images.shape == (2, 3, 5, 5)


def test_augmentation_is_reproducible_with_the_seed_and_differs_between_accesses() -> None:
    check_draws(split(augment="shift_flip"))


def test_a_loader_returns_every_image_once_in_order_with_a_smaller_last_batch() -> None:
    loaded = list(batches(split(10), 4))
    assert [tuple(images.shape) for images, _ in loaded] == [(4, 3, 9, 9), (4, 3, 9, 9), (2, 3, 9, 9)]
    assert order(loaded) == list(range(10))


def test_a_loader_supports_data_sets_that_are_indexed_by_single_images() -> None:
    loaded = list(batches(TensorDataset(torch.randn(5, 3, 8, 8), torch.arange(5)), 2))
    assert [tuple(images.shape) for images, _ in loaded] == [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)]
    assert order(loaded) == list(range(5))


def test_shuffling_uses_the_generator() -> None:
    def shuffled(seed: int) -> list[int]:
        return order(batches(split(50), 8, shuffle=True, generator=torch.Generator().manual_seed(seed)))

    assert shuffled(0) == shuffled(0)
    assert shuffled(0) != shuffled(1)
    assert sorted(shuffled(0)) == list(range(50))


def test_the_order_differs_between_epochs() -> None:
    loader = batches(split(50), 8, shuffle=True, generator=torch.Generator().manual_seed(0))
    assert order(loader) != order(loader)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_does_not_change_the_global_random_state(shuffle: bool) -> None:
    def states() -> str:
        return repr((torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())))

    before = states()
    list(batches(split(), 3, shuffle=shuffle))
    assert states() == before
