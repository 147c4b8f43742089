"""Steps as CUDA graphs: recorded once, replayed with one launch, on the same buffers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfkd_fast import distributed
from dfkd_fast.errors import first_line

from .compilation import Compiled
from .steps import Game, generator_step, student_step

__all__ = ["Steps", "preserved"]

WARM_UP = 3
"""Steps before a capture: cuDNN chooses its algorithms, the optimisers allocate their state."""

Losses = dict[str, Tensor]


class Recorded(NamedTuple):
    """A graph and the tensors it leaves its losses in."""

    graph: torch.cuda.CUDAGraph
    losses: Losses


class Steps:
    """The steps of a game. On a GPU each is captured at its first call and replayed from then on; elsewhere it just runs.

    A replay draws new latents (the random streams are registered with the graph), and sees new learning rates, which
    are tensors. What cannot be captured runs eagerly, and is said once.

    Args:
        game: who plays.
        capture: False to run everything eagerly.
        compiled: the networks that are compiled inside a step.
        remark: told in a line what is not captured, and why.
    """

    def __init__(self, game: Game, capture: bool, compiled: Compiled, remark: Callable[[str], None]) -> None:
        self.game = game
        self.compiled = compiled
        self.remark = remark
        self.capturing = capture and game.images.device.type == "cuda"
        self._recorded: dict[tuple[str, bool, bool], Recorded] = {}
        self._pool: Any = None
        if self.capturing and distributed.world_size() > 1:
            self._give_up("several processes average their gradients")
        if self.capturing and game.memory is not None and not game.memory.capturable:
            self._give_up("the memory's steps depend on each other's gradients")

    def student(self, step: int) -> Losses:
        """A student step, number ``step`` of its iteration."""
        memory = self.game.memory
        # Steps that do something else are other graphs: an empty memory replays nothing, an autoencoder learns in some.
        ready = memory is not None and memory.ready
        learns = memory is not None and step < memory.steps
        with self.compiled:
            return self._run(("student", ready, learns), lambda: student_step(self.game, step))

    def generator(self, *, adversarial: bool = True) -> Losses:
        """A generator step; without the adversary's term in pretraining."""
        with self.compiled:
            return self._run(("generator", adversarial, True), lambda: generator_step(self.game, adversarial=adversarial))

    def forget(self) -> None:
        """Capture anew: tensors were replaced."""
        self._recorded.clear()

    def _run(self, kind: tuple[str, bool, bool], step: Callable[[], Losses]) -> Losses:
        if not self.capturing:
            return step()
        if kind not in self._recorded:
            try:
                self._recorded[kind] = self._capture(step)
            except RuntimeError as error:  # whatever a user's network does that a graph cannot hold
                self._give_up(f"the {kind[0]} step: {first_line(error)}")
                return step()
        graph, losses = self._recorded[kind]
        graph.replay()
        return losses

    def _capture(self, step: Callable[[], Losses]) -> Recorded:
        side = torch.cuda.Stream()
        with preserved(self.game):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    step()
            torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        for stream in (self.game.fresh_stream, self.game.replay_stream):
            graph.register_generator_state(stream)
        # Not the default mode: a loader's thread that pins memory would break it.
        with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
            losses = step()
        self._pool = graph.pool()
        return Recorded(graph, losses)

    def _give_up(self, why: str) -> None:
        self.capturing = False
        self._recorded.clear()
        self.remark(f"steps run eagerly, not as CUDA graphs: {why}")


@contextmanager
def preserved(game: Game) -> Iterator[None]:
    """Whatever steps are taken inside, even one that fails, afterwards the game's tensors and random streams are as they were, in place."""
    before = [(tensor, tensor.detach().clone()) for tensor in _state(game)]
    streams = [(stream, stream.get_state()) for stream in (game.fresh_stream, game.replay_stream)]
    device = game.images.device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            known = {id(tensor) for tensor, _ in before}
            for tensor, value in before:
                tensor.copy_(value)
            for tensor in _state(game):
                if id(tensor) not in known:
                    tensor.zero_()  # an optimiser's state, which its first step makes, and which begins at 0
        for stream, state in streams:
            stream.set_state(state)


def _state(game: Game) -> Iterator[Tensor]:
    networks = [game.student, game.generator]
    optimizers = [game.student_optimizer, game.generator_optimizer]
    if game.average is not None:
        networks.append(game.average)
    if game.memory is not None:
        networks += game.memory.networks
        optimizers += game.memory.optimizers
    for network in networks:
        yield from network.parameters()
        yield from network.buffers()
    for optimizer in optimizers:
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
    yield from game.precision.tensors()
