"""Compilation of the networks with torch.compile, limited to the steps."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from dfkd_fast.choices import Region
from dfkd_fast.errors import first_line
from dfkd_fast.models import Generator

from .state import TrainState

__all__ = ["Compiled", "networks_of", "reason"]


class Compiled:
    """Context manager in which calls of some networks are compiled. Outside, as in evaluation, they are called as before.

    The modules are not replaced: parameters, state dicts, copies and pickles are unaffected. Hooks of submodules that are registered
    after the compilation are not called.

    Args:
        networks: Networks to compile, for every shape and mode that they are called with, up to Dynamo's ``recompile_limit``.
    """

    def __init__(self, networks: Iterable[nn.Module] = ()) -> None:
        self._calls: list[tuple[nn.Module, Callable[..., Any], Callable[..., Any] | None]] = []
        self.add(networks)

    def add(self, networks: Iterable[nn.Module]) -> None:
        """Compiles further networks from now on. Only outside of the context."""
        # The third entry is restored on exit: the user may have compiled a network with Module.compile.
        self._calls += [(network, _compiled_call(network), network._compiled_call_impl) for network in dict.fromkeys(networks)]

    def remove(self, networks: Iterable[nn.Module]) -> None:
        """Does not compile these networks any more. Only outside of the context."""
        removed = {id(network) for network in networks}
        self._calls = [call for call in self._calls if id(call[0]) not in removed]

    def __enter__(self) -> None:
        for network, compiled_call, _ in self._calls:
            network._compiled_call_impl = compiled_call

    def __exit__(self, *error: object) -> None:
        for network, _, original_call in self._calls:
            network._compiled_call_impl = original_call


def _compiled_call(network: nn.Module) -> Callable[..., Any]:
    """Returns the callable that ``network.compile()`` sets, with an outer frame of this file: Dynamo skips frames of torch's containers."""

    def call(*arguments: Any) -> Any:
        return network._call_impl(*arguments)

    # Dynamo limits recompilations per code object, which closures share: a copy gives each network its own limit.
    call.__code__ = call.__code__.replace()
    # Batches have a few fixed sizes, for which dynamic shapes would only make kernels slower.
    return torch.compile(call, dynamic=False)


def networks_of(region: Region, state: TrainState) -> Iterator[nn.Module]:
    """Yields the networks of a region of ``engine.compile``."""
    match region:
        case "teacher":
            yield from (state.teacher, state.observer.network)
            if state.features is not None:
                yield state.features.teacher.network
        case "student":
            yield state.student
            if state.features is not None:
                yield state.features.student.network
        case "generator":
            for generator in (state.generator, None if state.replay_source is None else state.replay_source.generator):
                if generator is not None:
                    # The steps call the body of generators of dfkd_fast.models and replace their head by a fused kernel.
                    yield generator.body if isinstance(generator, Generator) else generator


def reason(error: Exception) -> str:
    """Returns one line that says why a network could not be compiled."""
    cause = getattr(error, "inner_exception", error)  # of what Dynamo raises for an error in the compiler
    if not str(cause).startswith("Detected recompile"):
        return first_line(cause)
    guards = [line.strip().removeprefix("- ") for line in str(cause).splitlines() if line.strip().startswith("- ")]
    condition = guards[0].partition("(HINT")[0] if guards else ""
    return " ".join(f"its forward pass reads what changes from call to call: {condition}".split())
