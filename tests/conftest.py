import copy
from collections.abc import Callable

import pytest
import torch

from dfkd_fast import Method, Trainer
from tests.small import Networks, small_networks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="PyTorch sees no GPU here"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Sums over threads are grouped by their number, and these tests compare bits."""
    torch.set_num_threads(1)


@pytest.fixture
def make_trainer() -> Callable[..., Trainer]:
    """A trainer of small networks, always the same for the same arguments."""

    def make(method: Method, *, seed: int = 3, networks: Networks | None = None, **options: object) -> Trainer:
        teacher, student, generator = copy.deepcopy(networks or small_networks())
        return Trainer(teacher, student, generator, method, seed=seed, **options)  # type: ignore[arg-type]

    return make
