"""What every process of the tests stage's pytest needs, those of xdist included: ``-p bench.gpu.pytest_plugin``."""

import os
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

__all__ = ["pytest_addoption", "pytest_collection_modifyitems", "pytest_runtest_protocol"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--settled FILE``."""
    parser.addoption("--settled", type=Path, help="file with the tests that are not run again, one on each line")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that an earlier call settled."""
    file = config.getoption("settled")
    if file is None:
        return
    settled = set(file.read_text().splitlines())
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in settled])
    items[:] = [item for item in items if item.nodeid not in settled]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """End a worker whose test cost it the GPU, before all its further tests fail for that reason: xdist starts a new one."""
    result = yield
    if hasattr(item.config, "workerinput") and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
    return result
