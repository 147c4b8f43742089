"""pytest plugin of the tests stage, also loaded by the workers of xdist: ``-p bench.gpu.pytest_plugin``."""

import os
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

__all__ = ["pytest_addoption", "pytest_collection_modifyitems", "pytest_runtest_protocol"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--completed FILE``."""
    parser.addoption("--completed", type=Path, help="file with the tests to skip, one per line")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that an earlier call completed."""
    file = config.getoption("completed")
    if file is None:
        return
    completed = set(file.read_text().splitlines())
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in completed])
    items[:] = [item for item in items if item.nodeid not in completed]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Exit a worker whose test lost the GPU, before its other tests fail for that reason; xdist starts a new worker."""
    result = yield
    torch = sys.modules.get("torch")  # not imported here, since it takes seconds and not every test uses it
    if torch is not None and hasattr(item.config, "workerinput") and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
    return result
