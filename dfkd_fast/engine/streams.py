"""Independent random number generators for fresh and replayed latents on every process."""

from typing import Literal

import numpy as np
import torch

from dfkd_fast import distributed

__all__ = ["random_stream"]

ROLES = ("fresh", "replay")


def random_stream(seed: int, role: Literal["fresh", "replay"], device: torch.device) -> torch.Generator:
    """Returns the random number generator of this process for a role.

    The generator of fresh latents on rank 0 is seeded with ``seed``. All others are seeded with a hash of seed, role and rank, since
    PyTorch's CPU generator uses only the lower 32 bits of a seed.

    Args:
        seed: Seed of the run.
        role: What the generator draws.
        device: Device of the generator.
    """
    stream = torch.Generator(device)
    if role == "fresh" and distributed.rank() == 0:
        return stream.manual_seed(seed)
    hashed = np.random.SeedSequence(seed, spawn_key=(ROLES.index(role), distributed.rank())).generate_state(1)
    return stream.manual_seed(int(hashed[0]))
