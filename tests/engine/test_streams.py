import itertools

import pytest
import torch

from dfkd_fast import distributed
from dfkd_fast.engine.streams import random_stream

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", [0, 3, 2**31])
def test_fresh_and_replayed_latents_of_all_processes_are_independent(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    drawn = []
    for rank in range(4):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        drawn += [torch.randn(4000, generator=random_stream(seed, role, CPU)) for role in ("fresh", "replay")]
    for one, other in itertools.combinations(drawn, 2):
        assert torch.corrcoef(torch.stack([one, other]))[0, 1].abs() < 0.1  # 6 standard deviations


def test_a_stream_is_the_same_for_the_same_seed() -> None:
    for role in ("fresh", "replay"):
        one, other = (torch.randn(5, generator=random_stream(7, role, CPU)) for _ in range(2))
        assert torch.equal(one, other)
