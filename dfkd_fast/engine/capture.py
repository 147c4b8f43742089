"""CUDA graph capture of the steps: each kind of step is captured once and replayed with one launch on the same buffers."""

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
from dfkd_fast.choices import Region
from dfkd_fast.errors import first_line
from dfkd_fast.log import LOGGER
from dfkd_fast.out_of_memory import is_out_of_memory

from .clock import Clock
from .compilation import Compiled, networks_of, reason
from .device import benchmark_convolutions
from .state import TrainState, preserved
from .steps import generator_step, student_step

__all__ = ["Steps"]

WARM_UP = 3
"""Number of eager steps before a capture, in which cuDNN selects algorithms and the optimizers allocate their states."""

PYTORCH = Path(torch.__file__).parent
Losses = dict[str, Tensor]

UNFINISHED_GRAPHS: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture could not be ended. They are never freed, since the pinned memory allocator keeps pointers to them."""


class CapturedStep(NamedTuple):
    """A CUDA graph and its output tensors."""

    graph: torch.cuda.CUDAGraph
    losses: Losses


class Steps:
    """Runs the steps of a training, as CUDA graphs on a GPU and eagerly on a CPU.

    A step is captured at its first call and replayed afterwards. Replays draw new latents, because the random number generators are
    registered with the graph, and follow learning rate schedules, because learning rates are tensors. If a step cannot be captured,
    all steps run eagerly.

    The graphs share one memory pool and are captured on one stream, because the blocks of a pool belong to a stream. Returned losses
    are therefore valid only until the next step.

    Args:
        state: State of the training. ``engine.capture`` of its method enables the capture; a line is appended to its notes if it is not
            possible.
    """

    def __init__(self, state: TrainState) -> None:
        self.state = state
        self.compiled = Compiled()
        """Networks that are compiled: none before :meth:`compile`."""
        self.uncompiled = list(state.method.engine.compiled_regions)
        """Regions of ``engine.compile`` that :meth:`compile` has not compiled yet."""
        self.capturing = state.method.engine.capture and state.images.device.type == "cuda"
        self._captured: dict[tuple[str | bool, ...], CapturedStep] = {}
        self._pool: Any = None
        if self.capturing and distributed.world_size() > 1:
            self._disable("gradients are averaged over several processes")
        if self.capturing and state.replay_source is not None and not state.replay_source.capturable:
            self._disable("the gradients of the replay source accumulate across steps")
        if self.capturing and "apex_sgd" in (state.method.student_optimizer.kind, state.method.generator_optimizer.kind):
            self._disable("apex's SGD keeps its learning rate on the host, so a graph would not follow the schedule")

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.state.images.device)

    def student(self, step: int) -> Losses:
        """Runs a student step.

        Args:
            step: Index of the step in its iteration, from 0.

        Returns:
            Losses by name, each 0-d; see :func:`~dfkd_fast.engine.steps.student_step`.
        """
        with self.compiled:
            return self._run(self._kind_of_student_step(step), lambda: student_step(self.state, step))

    def _kind_of_student_step(self, step: int) -> tuple[str | bool, ...]:
        """Returns what determines the operations of a student step, so that each kind has its own graph."""
        source = self.state.replay_source
        draws_fresh = step % self.state.method.loop.steps_per_batch == 0
        # An empty source replays nothing; an autoencoder is trained in some steps only.
        return "student", draws_fresh, source is not None and source.ready, source is not None and step < source.steps

    def generator(self, *, adversarial: bool = True) -> Losses:
        """Runs a generator step.

        Args:
            adversarial: False in pretraining.

        Returns:
            Loss terms by name, each 0-d; see :func:`~dfkd_fast.engine.steps.generator_step`.
        """
        with self.compiled:
            return self._run(("generator", adversarial), lambda: generator_step(self.state, adversarial=adversarial))

    def compile(self) -> dict[Region, float]:
        """Compiles the networks of ``engine.compile`` for every kind of step; does nothing the second time.

        The steps are run, and the state is restored, except for what the networks keep in Python attributes. A region that cannot be
        compiled, that is not one graph, or that is compiled anew at every call, is not compiled, and a line is appended to the notes of
        the state.

        Returns:
            Seconds that were spent to compile each region, without those of the steps.
        """
        seconds: dict[Region, float] = {}
        while self.uncompiled:
            region = self.uncompiled.pop(0)
            if region == "student" and self.state.method.update.is_retain_acquire:
                kind = self.state.method.update.kind
                self.state.notes.append(f"the student is not compiled: update.kind {kind!r} differentiates it twice")
                continue
            networks = list(networks_of(region, self.state))
            self.compiled.add(networks)
            try:
                seconds[region] = self._compile_added()
            except Exception as error:  # the compiler's, and the user's code, which then raises it again in the first step
                if is_out_of_memory(error):
                    raise
                self.compiled.remove(networks)
                self.state.notes.append(f"engine.compile: the {region} is not compiled: {reason(error)}")
                LOGGER.info(self.state.notes[-1])
            else:
                LOGGER.info("compiled the %s in %.1f s", region, seconds[region])
        return seconds

    def _compile_added(self) -> float:
        """Compiles the networks that were added last; returns the seconds that it took."""
        clock, capturing = Clock(self.state.device), self.capturing
        self.capturing = False
        try:
            with clock.phase("first"), torch._dynamo.error_on_graph_break(True):
                self.warm_up()
            with clock.phase("second"), torch.compiler.set_stance("fail_on_recompile"):
                self.warm_up()
        finally:
            self.capturing = capturing
        seconds = clock.read()
        return max(seconds["first"] - seconds["second"], 0.0)

    def warm_up(self) -> None:
        """Runs every kind of step of the training and restores the state. Afterwards, no step allocates more GPU memory.

        Raises:
            torch.OutOfMemoryError: A step does not fit into GPU memory.
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
        loop, source = self.state.method.loop, self.state.replay_source
        learning = 0 if source is None else source.steps
        first_of_kind: dict[tuple[str | bool, ...], int] = {}
        for step in range(min(loop.student_steps, learning + loop.steps_per_batch)):  # later steps repeat these kinds
            first_of_kind.setdefault(self._kind_of_student_step(step), step)
        for step in first_of_kind.values():
            self.student(step)
        self.generator()

    def reset(self) -> None:
        """Discards all graphs, so that steps are captured again; required after tensors were replaced."""
        self._captured.clear()
        self._pool = None  # PyTorch does not capture into a pool whose graphs were all destroyed

    def _run(self, kind: tuple[str | bool, ...], step: Callable[[], Losses]) -> Losses:
        device = self.state.images.device
        if self.capturing and kind not in self._captured:
            try:
                with torch.cuda.device(device), benchmark_convolutions(device):
                    self._captured[kind] = self._capture(step)
            except RuntimeError as error:  # a user's network may contain operations that cannot be captured
                chain = list(_chain(error))
                for link in chain:
                    if is_out_of_memory(link):
                        raise link from None
                self._disable(f"the {kind[0]} step: {first_line(chain[-1])}{_user_line(chain[-1])}")
        if not self.capturing:
            with benchmark_convolutions(device):
                return step()
        graph, losses = self._captured[kind]
        graph.replay()
        return losses

    def _capture(self, step: Callable[[], Losses]) -> CapturedStep:
        self._warm_up(step)
        gc.collect()  # frees memory, and avoids a collection during the capture, which fails if it destroys another graph
        graph = self._new_graph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            # torch.cuda.graph alone does not restore the current stream if the capture cannot be ended.
            # Thread-local mode: otherwise pinning memory in a data loader's thread would invalidate the capture.
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                losses = step()
        except BaseException:
            self._end_failed_capture(graph)
            raise
        finally:
            self.state.drop_gradients()  # so that the next graph can reuse their memory in the pool
        return CapturedStep(graph, losses)

    def _warm_up(self, step: Callable[[], Losses]) -> None:
        current = torch.cuda.current_stream()
        with preserved(self.state):
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    for _ in range(WARM_UP - 1):
                        step()
                    # Detects synchronizing operations before the capture, which they would invalidate, with an error that names them.
                    with _error_on_synchronize():
                        step()
            finally:
                current.wait_stream(self._stream)

    def _new_graph(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        for stream in (self.state.fresh_stream, self.state.replay_stream):
            graph.register_generator_state(stream)
        return graph

    def _end_failed_capture(self, graph: torch.cuda.CUDAGraph) -> None:
        """Performs the clean-up that ``CUDAGraph.capture_end`` of PyTorch 2.11 omits when CUDA reports an invalid capture.

        Without it the allocator assumes that a capture is active and raises when its cache is emptied, and every registered random
        number generator, including the default one, raises when it draws.
        """
        device, pool, self._pool = self.state.images.device.index, self._pool, None
        with suppress(RuntimeError):
            graph.pool()
            return  # the capture was ended, only the step failed
        UNFINISHED_GRAPHS.append(graph)
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
        # The random number generators are reset only by the end of a capture: of this one, which is never replayed.
        with torch.cuda.graph(self._new_graph(), stream=torch.cuda.Stream(self.state.images.device), capture_error_mode="thread_local"):
            self.state.labels.zero_()

    def _disable(self, reason: str) -> None:
        self.capturing = False
        self.reset()
        self.state.notes.append(f"steps run eagerly, not as CUDA graphs: {reason}")


def _chain(error: BaseException) -> Iterator[RuntimeError]:
    """Yields an exception and its causes, the root cause last: after an error in a capture, ending the capture raises as well."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, RuntimeError):
            yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _user_line(error: BaseException) -> str:
    """Returns the innermost file and line outside PyTorch in parentheses; empty if there is none."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not Path(frame.filename).is_relative_to(PYTORCH)]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


@contextmanager
def _error_on_synchronize() -> Iterator[None]:
    """Context manager in which operations that synchronize the device raise an error."""
    previous = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the mode is a prototype feature
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(previous)
