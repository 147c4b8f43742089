"""Random streams that have nothing to do with each other: of fresh and replayed latents, in every process."""

from typing import Literal

import numpy as np
import torch

from dfkd_fast import distributed

__all__ = ["random_stream"]

ROLES = ("fresh", "replay")


def random_stream(seed: int, role: Literal["fresh", "replay"], device: torch.device) -> torch.Generator:
    """This process's stream for a role; the first process's fresh one begins at the seed itself.

    The others' seeds are hashed: PyTorch's CPU generator heeds the lower 32 bits only, so an offset above them is none.
    """
    stream = torch.Generator(device)
    if role == "fresh" and distributed.rank() == 0:
        return stream.manual_seed(seed)
    hashed = np.random.SeedSequence(seed, spawn_key=(ROLES.index(role), distributed.rank())).generate_state(1)
    return stream.manual_seed(int(hashed[0]))
