from collections.abc import Iterator

import pytest
import torch

from dfkd_fast.kernels import Backend, use_backend
from dfkd_fast.kernels.dispatch import backends, unavailable_reason

ON_CPU = backends(torch.device("cpu"))  # a GPU's backends, too, in the processes that on_cpu.py starts
FUSED = ["numba", *(pytest.param(name, marks=[] if name in ON_CPU else pytest.mark.gpu) for name in ("triton", "cuda"))]


def _forced(backend: Backend) -> Iterator[Backend]:
    if reason := unavailable_reason(backend):
        pytest.skip(f"the backend {backend} is not here: {reason}")
    with use_backend(backend):
        yield backend


@pytest.fixture(params=["reference", *FUSED])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every backend in turn, forced for the test."""
    yield from _forced(request.param)


@pytest.fixture(params=FUSED)
def fused(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every backend but the reference."""
    yield from _forced(request.param)


@pytest.fixture(params=FUSED[:2])
def norm_backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every backend that has kernels for batch_norm_leaky_relu: numba and triton."""
    yield from _forced(request.param)


@pytest.fixture(params=FUSED[1:2])
def triton(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The backend triton, for what no other does."""
    yield from _forced(request.param)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """A device that the test's backend serves."""
    name = next(
        request.getfixturevalue(fixture) for fixture in ("backend", "fused", "norm_backend", "triton") if fixture in request.fixturenames
    )
    return torch.device("cpu" if name in ON_CPU else "cuda")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch.empty returns is full of NaN, or of the greatest integer: what a kernel leaves unwritten shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=FUSED[1:])
def gpu_backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every backend that serves a GPU."""
    yield from _forced(request.param)
