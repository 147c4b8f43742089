"""Tests of the memory bank: stored batches, and a pool of stored samples."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from dfkd_fast.methods import Batch, MemoryBank, Part, Replay
from tests.states import assert_equal, through_a_file


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


Storage = Literal["float32", "half", "uint8"]


def bank(slots: int = 3, rows: int = 2, *, every: int = 1, storage: Storage = "float32", cached_logits: bool = False) -> MemoryBank:
    # The contents must not be replayed.
    images, logits = torch.full((rows, 3, 4, 5), float("nan")), torch.full((rows, 7), float("nan"))
    return MemoryBank(images, logits, slots=slots, every=every, storage=storage, cached_logits=cached_logits)


def fresh(number: int, rows: int = 4) -> Batch:
    """Images and logits that encode their number."""
    torch.manual_seed(number)
    return Batch(number + torch.rand(rows, 3, 4, 5) / 2, number + torch.rand(rows, 7) / 2, [Part(rows, 1.0)])


def draws(source: MemoryBank, count: int, seed: int = 0) -> list[tuple[Tensor, Tensor | None]]:
    random, drawn = stream(seed), []
    for _ in range(count):
        images = torch.full((source.rows, 3, 4, 5), float("nan"))
        drawn.append((images, source.recall(images, random)))
    return drawn


@pytest.mark.parametrize("stored", [1, 2, 3, 4, 5, 7])
def test_a_ring_replays_the_newest_batches_uniformly_and_no_slot_that_is_not_filled(stored: int) -> None:
    source = bank(slots=3)
    for number in range(1, stored + 1):
        source.end_epoch(number, fresh(number))
    alive = [number for number in range(1, stored + 1) if number > stored - 3]
    counts = dict.fromkeys(alive, 0)
    stored_images = {number: fresh(number).images[:2] for number in alive}
    for images, logits in draws(source, 300):
        assert logits is None
        number = int(images.min())
        assert torch.equal(images, stored_images[number])
        counts[number] += 1
    # Six standard deviations of a binomial distribution with 300 draws are at most 52.
    assert all(abs(count - 300 / len(alive)) < 52 for count in counts.values())


def test_a_bank_that_is_empty_is_not_ready_and_stores_at_the_end_of_every_nth_epoch() -> None:
    source, filled = bank(slots=2, every=3), []
    for epoch in range(1, 10):
        source.end_epoch(epoch, fresh(epoch))
        filled.append(source.ready)
    assert filled == [False, False, *7 * [True]]
    assert {int(images.min()) for images, _ in draws(source, 40)} == {6, 9}


def test_half_storage_returns_the_images_rounded_to_half() -> None:
    source = bank(storage="half")
    source.end_epoch(1, fresh(1))
    ((images, _),) = draws(source, 1)
    assert torch.equal(images, fresh(1).images[:2].half().float())
    assert source.images.dtype == torch.float16


def test_uint8_storage_has_an_error_of_at_most_half_a_level_of_each_channels_range() -> None:
    torch.manual_seed(0)
    # Far apart in scale and offset; the last channel is constant.
    images = torch.randn(2, 3, 4, 5) * torch.tensor([1e-3, 50.0, 0.0])[:, None, None] + torch.tensor([7.0, -30.0, 0.3])[:, None, None]
    source = bank(storage="uint8")
    source.store(2 * images, torch.zeros(2, 7))
    source.store(images, torch.zeros(2, 7))
    assert source.images.dtype == torch.uint8
    actual = next(recalled for recalled, _ in draws(source, 20) if abs(recalled[0, 0, 0, 0].item() - 7) < 1)
    ranges = images.amax((0, 2, 3)) - images.amin((0, 2, 3))
    errors = (actual - images).abs().amax((0, 2, 3))
    # Half a quantization level plus rounding at the largest magnitude.
    assert (errors <= ranges / 255 / 2 + 4e-7 * images.abs().amax((0, 2, 3))).all()
    assert (errors[:2] > ranges[:2] / 255 / 4).all()
    assert torch.equal(actual[:, 2], images[:, 2])
    assert source.images[1, :, :2].amax((0, 2, 3)).tolist() == [255, 255]


@pytest.mark.parametrize("storage", ["float32", "half", "uint8"])
def test_cached_logits_are_those_of_the_batch_that_is_replayed(storage: Storage) -> None:
    source, recorded = bank(storage=storage, cached_logits=True), set()
    for number in range(1, 5):
        source.end_epoch(number, fresh(number))
    for images, logits in draws(source, 30):
        number = round(images.min().item() - 0.1)
        recorded.add(number)
        assert logits is not None
        assert torch.equal(logits, fresh(number).teacher_logits[:2])
    assert recorded == {2, 3, 4}


@pytest.mark.parametrize("storage", ["float32", "half", "uint8"])
@pytest.mark.parametrize("cached_logits", [False, True])
@pytest.mark.parametrize("stored", [0, 2, 4])
def test_a_restored_bank_draws_the_same_batches_and_overwrites_the_same_slot(storage: Storage, cached_logits: bool, stored: int) -> None:
    source, restored = (bank(storage=storage, cached_logits=cached_logits) for _ in range(2))
    for number in range(1, stored + 1):
        source.end_epoch(number, fresh(number))
    restored.load_state_dict(through_a_file(source.state_dict()))
    assert restored.ready is source.ready
    for number in (8, 9):
        if source.ready:
            drawn = draws(source, 12)
            assert_equal(draws(restored, 12), drawn)
            assert all((logits is not None) is cached_logits for _, logits in drawn)
        for one in (source, restored):
            one.end_epoch(number, fresh(number))


def pool(rows: int, **options: Any) -> MemoryBank:
    """A bank of batches of four samples that replays single samples."""
    images, logits = torch.full((4, 3, 4, 5), float("nan")), torch.full((4, 7), float("nan"))
    return MemoryBank(images, logits, slots=3, every=1, every_unit="iterations", samples=rows, cached_logits=True, **options)


@pytest.mark.parametrize("stored", [1, 2, 3, 5])
def test_a_bank_of_samples_replays_every_stored_sample_uniformly_and_independently(stored: int) -> None:
    source = pool(rows=3000, storage="float32")
    for iteration in range(1, stored + 1):
        source.end_iteration(iteration, fresh(iteration))
    alive = range(max(1, stored - 2), stored + 1)
    samples = torch.cat([fresh(number).images for number in alive]).flatten(1)
    ((images, logits),) = draws(source, 1)
    assert logits is not None
    matches = (images.flatten(1)[:, None] == samples).all(2)
    assert (matches.sum(1) == 1).all()
    assert torch.equal(logits, torch.cat([fresh(number).teacher_logits for number in alive])[matches.int().argmax(1)])
    # Six standard deviations of a binomial distribution with 3000 draws are at most 143.
    counts = matches.sum(0)
    assert ((counts - 3000 / len(samples)).abs() < 143).all()
    following = matches[1:][matches[:-1, 0]].sum(0)  # draws after the first sample
    assert ((following - counts[0] / len(samples)).abs() < 6 * (counts[0] / len(samples)) ** 0.5).all()


@pytest.mark.parametrize("storage", ["half", "uint8"])
def test_a_bank_of_samples_restores_each_sample_at_the_scale_of_its_batch(storage: Storage) -> None:
    source = pool(rows=200, storage=storage)
    for number, scale in ((1, 1e-3), (2, 10.0)):
        source.store(scale * fresh(number).images, fresh(number).teacher_logits)
    ((images, logits),) = draws(source, 1)
    assert logits is not None
    small = logits.amax(1) < 2
    assert 60 < small.sum() < 140
    for number, scale, drawn in ((1, 1e-3, images[small]), (2, 10.0, images[~small])):
        errors = (drawn[:, None] - scale * fresh(number).images).abs().flatten(2).amax(2).amin(1)
        assert (errors <= scale * number * 1e-3).all()


def test_a_bank_of_samples_holds_more_rows_than_it_stores_a_batch_and_other_banks_do_not() -> None:
    Replay(kind="memory_bank", rows=9, memory_bank={"draw": "samples"}).policy.check(9, 8)  # type: ignore[arg-type, union-attr]
    with pytest.raises(ValueError, match=r"replay\.rows = 9: must be at most loop\.batch_size = 8; .*memory_bank\.draw = 'samples'"):
        Replay(kind="memory_bank", rows=9).policy.check(9, 8)  # type: ignore[union-attr]


@pytest.mark.parametrize("unit", ["epochs", "iterations"])
def test_a_bank_stores_at_the_ends_of_the_unit_of_every(unit: Literal["epochs", "iterations"]) -> None:
    images, logits = fresh(0).images, fresh(0).teacher_logits
    source = MemoryBank(images, logits, slots=9, every=2, every_unit=unit)
    for number in range(1, 4):
        source.end_epoch(number, fresh(number))
    assert source.stored == (1 if unit == "epochs" else 0)
    for number in range(1, 6):
        source.end_iteration(number, fresh(number))
    assert source.stored == (1 if unit == "epochs" else 2)
