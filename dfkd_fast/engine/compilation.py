"""torch.compile of the networks, inside the steps and nowhere else."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from dfkd_fast.models import Generator

from .state import TrainState

__all__ = ["Compiled", "networks_to_compile"]


class Compiled:
    """Inside this context, calls of some networks are compiled; outside, as in evaluation with its other batch sizes, they are not.

    The networks are not replaced: parameters, hooks, state dicts, copies and pickles stay theirs.

    Args:
        networks: each is compiled for every shape and mode it is called with, up to Dynamo's ``recompile_limit``.
    """

    def __init__(self, networks: Iterable[nn.Module] = ()) -> None:
        # Outside, whoever compiled a network before keeps that.
        self._calls = [(network, _compiled_call(network), network._compiled_call_impl) for network in dict.fromkeys(networks)]

    def __enter__(self) -> None:
        for network, inside, _ in self._calls:
            network._compiled_call_impl = inside

    def __exit__(self, *error: object) -> None:
        for network, _, outside in self._calls:
            network._compiled_call_impl = outside


def _compiled_call(network: nn.Module) -> Callable[..., Any]:
    """What ``network.compile()`` sets, but with a frame of ours outermost: Dynamo skips those of torch's own containers."""

    def call(*arguments: Any) -> Any:
        return network._call_impl(*arguments)

    # Dynamo limits recompilations by code object, and closures share theirs: each network has a limit of its own.
    call.__code__ = call.__code__.replace()
    # Batches come in a few sizes that never change, so that general shapes would only make slower kernels.
    return torch.compile(call, dynamic=False)


def networks_to_compile(state: TrainState) -> Iterator[nn.Module]:
    """What the steps call and ``engine.compile`` asks to compile."""
    if not state.method.engine.compile:
        return
    yield from (state.teacher, state.observer.network)
    if state.method.update.is_retain_acquire:
        state.notes.append(f"the student is not compiled: update.kind {state.method.update.kind!r} differentiates it twice")
    else:
        yield state.student
    for generator in (state.generator, None if state.replay_source is None else state.replay_source.generator):
        if generator is not None:
            # The steps call the body of ours, and make its end a kernel of its own.
            yield generator.body if isinstance(generator, Generator) else generator
