from collections.abc import Iterator

import pytest
import torch

from dfkd_fast.kernels import Backend, use_backend
from dfkd_fast.kernels.dispatch import backends, unavailable_reason

ON_CPU = backends(torch.device("cpu"))  # includes GPU backends in the processes started by on_cpu.py
FUSED = ["numba", *(pytest.param(name, marks=[] if name in ON_CPU else pytest.mark.gpu) for name in ("triton", "cuda"))]


def _forced(backend: Backend) -> Iterator[Backend]:
    if reason := unavailable_reason(backend):
        pytest.skip(f"the backend {backend} is unavailable: {reason}")
    with use_backend(backend):
        yield backend


@pytest.fixture(params=["reference", *FUSED])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend, forced for the test."""
    yield from _forced(request.param)


@pytest.fixture(params=FUSED)
def fused(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend except the reference, forced."""
    yield from _forced(request.param)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """A device that the backend of the test supports."""
    name = next(request.getfixturevalue(fixture) for fixture in ("backend", "fused", "triton") if fixture in request.fixturenames)
    return torch.device("cpu" if name in ON_CPU else "cuda")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill memory from torch.empty with NaN or the largest integer, so that elements a kernel does not write are detected."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=FUSED[1:])
def gpu_backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each GPU backend, forced."""
    yield from _forced(request.param)
