import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dfkd_fast import GeneratorA, Loop, Method, Optimizer, Replay, Trainer
from dfkd_fast.models import build_classifier

Networks = tuple[nn.Module, nn.Module, nn.Module]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="PyTorch sees no GPU here"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Sums over threads are grouped by their number, and these tests compare bits."""
    torch.set_num_threads(1)


def small_networks(seed: int = 0, *, teacher: str = "lenet5", student: str = "lenet5_half", channels: int = 1) -> Networks:
    torch.manual_seed(seed)
    size = 32 if "lenet5" in (teacher, student) else 16
    return build_classifier(teacher, 10, channels), build_classifier(student, 10, channels), GeneratorA(20, channels, size, width=4)


def small_method(
    *,
    replay: Replay | None = None,
    epochs: int = 2,
    iterations: int = 3,
    batch_size: int = 8,
    channels_last: bool = False,
    student_steps: int = 2,
) -> Method:
    return Method(
        loop=Loop(
            epochs=epochs,
            iterations_per_epoch=iterations,
            batch_size=batch_size,
            student_steps=student_steps,
            channels_last=channels_last,
        ),
        replay=replay or Replay(),
        student_optimizer=Optimizer(lr=0.01, weight_decay=5e-4, schedule="cosine"),
        generator_optimizer=Optimizer(kind="adam", lr=1e-3),
    )


@pytest.fixture
def make_trainer() -> Callable[..., Trainer]:
    """A trainer of small networks, always the same for the same arguments."""

    def make(method: Method, *, seed: int = 3, networks: Networks | None = None, **options: object) -> Trainer:
        teacher, student, generator = copy.deepcopy(networks or small_networks())
        return Trainer(teacher, student, generator, method, seed=seed, **options)  # type: ignore[arg-type]

    return make
