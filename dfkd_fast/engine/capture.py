"""Steps as CUDA graphs: recorded once, replayed with one launch, on the same buffers."""

import gc
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfkd_fast import distributed
from dfkd_fast.errors import first_line
from dfkd_fast.out_of_memory import is_out_of_memory

from .compilation import Compiled, networks_to_compile
from .device import cudnn_benchmark
from .state import TrainState, preserved
from .steps import generator_step, student_step

__all__ = ["Steps"]

WARM_UP = 3
"""Steps before a capture: cuDNN chooses its algorithms, the optimisers allocate their state."""

PYTORCH = Path(torch.__file__).parent
Losses = dict[str, Tensor]

UNFINISHED_GRAPHS: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture could not be ended. They are never freed: the allocator of pinned memory keeps pointers to them."""


class CapturedStep(NamedTuple):
    """A graph and the tensors it leaves its losses in."""

    graph: torch.cuda.CUDAGraph
    losses: Losses


class Steps:
    """The steps of a training. On a GPU each is captured at its first call and replayed from then on; elsewhere it just runs.

    A replay draws new latents (the random streams are registered with the graph), and sees new learning rates, which
    are tensors. What cannot be captured runs eagerly, and is said once.

    The graphs share one memory pool and are captured on one stream, as the blocks of a pool belong to a stream. So losses are
    valid until the next step only.

    Args:
        state: of the training. Its method says what is captured and compiled; its notes are told in a line what is not, and why.
    """

    def __init__(self, state: TrainState) -> None:
        self.state = state
        self.compiled = Compiled(networks_to_compile(state))
        self.capturing = state.method.engine.capture and state.images.device.type == "cuda"
        self._recorded: dict[tuple[str, bool, bool], CapturedStep] = {}
        self._pool: Any = None
        if self.capturing and distributed.world_size() > 1:
            self._disable("several processes average their gradients")
        if self.capturing and state.replay_source is not None and not state.replay_source.capturable:
            self._disable("the memory's steps depend on each other's gradients")
        if self.capturing and "apex_sgd" in (state.method.student_optimizer.kind, state.method.generator_optimizer.kind):
            self._disable("apex's SGD has its learning rate on the host, and a graph would never see it change")

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.state.images.device)

    def student(self, step: int) -> Losses:
        """A student step, number ``step`` of its iteration."""
        replay_source = self.state.replay_source
        # Steps that do something else are other graphs: an empty memory replays nothing, an autoencoder learns in some.
        ready = replay_source is not None and replay_source.ready
        learns = replay_source is not None and step < replay_source.steps
        with self.compiled:
            return self._run(("student", ready, learns), lambda: student_step(self.state, step))

    def generator(self, *, adversarial: bool = True) -> Losses:
        """A generator step; without the adversary's term in pretraining."""
        with self.compiled:
            return self._run(("generator", adversarial, True), lambda: generator_step(self.state, adversarial=adversarial))

    def warm_up(self) -> None:
        """Take every kind of step that the run has, in its order, and take them back: after that, none needs more GPU memory.

        Raises:
            torch.OutOfMemoryError: there is not enough.
        """
        replay_source = self.state.replay_source
        with preserved(self.state):
            if self.state.method.loop.generator_pretraining:
                self.generator(adversarial=False)
            self._take_each()
            if replay_source is not None and not replay_source.ready:
                with replay_source.assumed_ready():
                    self._take_each()

    def _take_each(self) -> None:
        learning = 0 if self.state.replay_source is None else self.state.replay_source.steps
        for step in dict.fromkeys((0, min(learning, self.state.method.loop.student_steps - 1))):
            self.student(step)
        self.generator()

    def reset(self) -> None:
        """Capture anew: tensors were replaced."""
        self._recorded.clear()
        self._pool = None  # its last graph is gone, and PyTorch refuses to capture into a pool without one

    def _run(self, kind: tuple[str, bool, bool], step: Callable[[], Losses]) -> Losses:
        device = self.state.images.device
        if self.capturing and kind not in self._recorded:
            try:
                with torch.cuda.device(device), cudnn_benchmark(device):
                    self._recorded[kind] = self._capture(step)
            except RuntimeError as error:  # whatever a user's network does that a graph cannot hold
                chain = list(_chain(error))
                for link in chain:
                    if is_out_of_memory(link):
                        raise link from None
                self._disable(f"the {kind[0]} step: {first_line(chain[-1])}{_where(chain[-1])}")
        if not self.capturing:
            with cudnn_benchmark(device):
                return step()
        graph, losses = self._recorded[kind]
        graph.replay()
        return losses

    def _capture(self, step: Callable[[], Losses]) -> CapturedStep:
        self._warm_up(step)
        gc.collect()  # frees memory for the graph; during the capture a collection could destroy another graph, and fail it
        graph = self._new_graph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            # torch.cuda.graph alone would leave its stream current if the capture cannot be ended.
            # Not the default mode: a loader's thread that pins memory would break it.
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                losses = step()
        except BaseException:
            self._end_failed_capture(graph)
            raise
        finally:
            self.state.drop_gradients()  # they lie in the pool, where the next graph can use their memory
        return CapturedStep(graph, losses)

    def _warm_up(self, step: Callable[[], Losses]) -> None:
        current = torch.cuda.current_stream()
        with preserved(self.state):
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    for _ in range(WARM_UP - 1):
                        step()
                    # An operation that waits for the device is found here: this error names it, and leaves no invalid capture.
                    with _synchronizing_is_an_error():
                        step()
            finally:
                current.wait_stream(self._stream)

    def _new_graph(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        for stream in (self.state.fresh_stream, self.state.replay_stream):
            graph.register_generator_state(stream)
        return graph

    def _end_failed_capture(self, graph: torch.cuda.CUDAGraph) -> None:
        """Finish what ``CUDAGraph.capture_end`` of PyTorch 2.11 skips when CUDA reports an invalid capture.

        Otherwise the allocator believes that a capture is under way, and raises when its cache is emptied; and every registered
        generator, the default one among them, raises when it draws.
        """
        device, pool, self._pool = self.state.images.device.index, self._pool, None
        with suppress(RuntimeError):
            graph.pool()
            return  # the capture was ended: only the step failed
        UNFINISHED_GRAPHS.append(graph)
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
        # Only the end of a capture resets the generators: of this one, which is never replayed.
        with torch.cuda.graph(self._new_graph(), stream=torch.cuda.Stream(self.state.images.device), capture_error_mode="thread_local"):
            self.state.labels.zero_()

    def _disable(self, why: str) -> None:
        self.capturing = False
        self.reset()
        self.state.notes.append(f"steps run eagerly, not as CUDA graphs: {why}")


def _chain(error: BaseException) -> Iterator[RuntimeError]:
    """An error and those it was raised during, the first one last: once something in a capture has failed, its end fails as well."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, RuntimeError):
            yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _where(error: BaseException) -> str:
    """The innermost line outside PyTorch: what a user can change."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not Path(frame.filename).is_relative_to(PYTORCH)]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


@contextmanager
def _synchronizing_is_an_error() -> Iterator[None]:
    """Inside, an operation that waits for the device is an error."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
