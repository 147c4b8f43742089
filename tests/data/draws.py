"""A check of random augmentation for all kinds of splits."""

from typing import Any

import torch

__all__ = ["check_draws"]


def check_draws(data: Any) -> None:
    """Asserts that augmentation is reproducible with the same seed, and differs between accesses and seeds."""
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append([data.__getitems__([0, 1, 2])[0] for _ in range(2)])
    assert torch.equal(draws[0][0], draws[1][0])
    assert torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[0][1])
    assert not torch.equal(draws[0][0], draws[2][0])
