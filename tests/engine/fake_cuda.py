"""A fake of the parts of torch.cuda that captures use, including the state that PyTorch 2.11 leaves after a failed capture."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

SYNCHRONIZING = "called a synchronizing CUDA operation"
NOT_PERMITTED = "CUDA error: operation not permitted when stream is capturing"
CAPTURE_FAILED = "CUDA error: operation failed due to a previous error during capture"


class FakeCuda:
    """Fake of torch.cuda that runs steps on the CPU, also during capture. Public methods are operations that a step may perform."""

    def __init__(self, patched: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.captures: list[FakeGraph] = []
        """Graphs whose capture succeeded."""
        self.capturing = self.invalid = False
        self.sync_mode = 0
        self.device: Any = "current"
        self.stream: Any = "default"
        self.marked: set[Any] = set()
        """Random number generators in capture mode."""
        self.recording: list[Any] = []
        """Memory pools that the allocator assigns to an active capture."""
        self.pools: list[str] = []
        self.released: list[str] = []
        for name, value in {
            "CUDAGraph": lambda: FakeGraph(self),
            "Stream": lambda device=None: FakeStream(self),
            "current_stream": lambda: self.stream if isinstance(self.stream, FakeStream) else FakeStream(self),
            "device": lambda device: self._during("device", device),
            "get_sync_debug_mode": lambda: self.sync_mode,
            "graph": self._graph,
            "graph_pool_handle": self._new_pool,
            "set_sync_debug_mode": self._set_sync_mode,
            "stream": lambda stream: self._during("stream", stream),
        }.items():
            patched.setattr(torch.cuda, name, value)
        patched.setattr(torch._C, "_cuda_endAllocateToPool", self._end_allocation, raising=False)
        patched.setattr(torch._C, "_cuda_releasePool", lambda device, pool: self.released.append(pool), raising=False)

    def wait(self) -> None:
        """A synchronizing operation, like ``Tensor.item``."""
        if self.sync_mode == 2:
            raise RuntimeError(SYNCHRONIZING)
        self.call_library()

    def call_library(self) -> None:
        """An operation that is not permitted during capture and does not synchronize."""
        if self.capturing:
            self.invalid = True
            raise RuntimeError(NOT_PERMITTED)

    def draw(self) -> None:
        """Draws random numbers."""
        if self.marked and not self.capturing:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    @property
    def unharmed(self) -> bool:
        """Whether the CUDA state is that before the first capture."""
        return not self.marked and not self.recording and self.sync_mode == 0 and (self.device, self.stream) == ("current", "default")

    @contextmanager
    def _during(self, name: str, value: Any) -> Iterator[None]:
        before = getattr(self, name)
        setattr(self, name, value)
        try:
            yield
        finally:
            setattr(self, name, before)

    @contextmanager
    def _graph(self, graph: "FakeGraph", pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
        assert not self.recording, "the allocator's cache cannot be emptied during a capture"
        before, self.stream = self.stream, stream
        graph.where = self.device, stream, pool or self._new_pool()
        self.marked |= graph.generators
        self.recording.append(graph.where[-1])
        self.events.append("capture")
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False
            if self.invalid:  # capture_end raises: nothing below is reached, and the stream stays current
                self.invalid = False
                raise RuntimeError(CAPTURE_FAILED)
            self._end_allocation(None, graph.where[-1])
            self.marked -= graph.generators
            self.captures.append(graph)
            self.stream = before

    def _new_pool(self) -> str:
        self.pools.append(f"pool {len(self.pools)}")
        return self.pools[-1]

    def _end_allocation(self, device: int | None, pool: Any) -> None:
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)

    def _set_sync_mode(self, mode: int | str) -> None:
        self.sync_mode = 2 if mode == "error" else int(mode)


class FakeGraph:
    """Fake of ``torch.cuda.CUDAGraph``."""

    where: tuple[Any, Any, Any]
    """Device, stream and pool of its capture."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.generators: set[Any] = {"default"}

    def register_generator_state(self, generator: Any) -> None:
        self.generators.add(generator)

    def replay(self) -> None:
        self.cuda.draw()

    def pool(self) -> Any:
        if self not in self.cuda.captures:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return self.where[-1]


class FakeStream:
    """Fake of ``torch.cuda.Stream``."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def wait_stream(self, other: "FakeStream") -> None:
        self.cuda.events.append("wait")
