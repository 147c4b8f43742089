"""The kernels of an iteration, recorded by running the steps on fake tensors: no arithmetic is done and no GPU is needed."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from dfkd_fast import Recipe
from dfkd_fast.engine.prepare import prepare
from dfkd_fast.engine.state import TrainState
from dfkd_fast.engine.steps import generator_step, student_step
from dfkd_fast.kernels import dispatch, moments

from ..end_to_end import networks
from .cost import Call, Kernel, kernels

__all__ = ["PHASES", "Launch", "Layer", "Phase", "trace"]

PHASES = ("student step", "generator step")


@dataclass(frozen=True)
class Layer:
    """A layer of a network, or work outside of the networks."""

    network: str = ""
    """Role of the network; empty outside of the networks."""
    name: str = ""
    """Qualified name of the module."""
    module: type | None = None


@dataclass(frozen=True)
class Launch:
    """A kernel launch of a step."""

    layer: Layer
    backward: bool
    operator: str
    kernel: Kernel


@dataclass(frozen=True)
class Phase:
    """The launches of all steps of one kind in an iteration."""

    name: str
    steps: int
    launches: list[Launch]
    peak_bytes: int
    """Peak memory of the tensors that a step allocates, in bytes; without what libraries allocate, such as workspaces of cuDNN."""
    resident_bytes: int
    """Memory of weights, averages, optimizer states and static buffers, in bytes."""


def trace(recipe: Recipe) -> list[Phase]:
    """Return the kernels of an iteration of a recipe on a GPU, with untrained networks and a filled replay.

    Raises:
        DfkdError: The networks are incompatible with each other or with the method.
    """
    state = prepare(*networks(recipe), recipe, seed=0, device=torch.device("cpu"), optimize_for="cuda")
    source, loop = state.replay_source, recipe.loop
    steps: list[tuple[str, list[Callable[[], object]]]] = [
        (PHASES[0], [partial(student_step, state, step) for step in range(loop.student_steps)]),
        (PHASES[1], [partial(generator_step, state)] * loop.generator_steps),
    ]
    phases = []
    with (
        warnings.catch_warnings(),
        _gpu_kernels(),
        FakeTensorMode(allow_non_fake_inputs=True),
        nullcontext() if source is None or source.ready else source.assumed_ready(),
        _named_layers(state) as current,
    ):
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # by checks that buffers do not overlap
        for name, calls in steps:
            recorder = _Recorder(current)
            for call in calls[:1]:
                call()  # the optimizer allocates its states
            for call in calls:
                with recorder:
                    call()
            phases.append(Phase(name, len(calls), recorder.launches, recorder.memory.peak, _resident_bytes(state)))
    return phases


def _resident_bytes(state: TrainState) -> int:
    networks = [state.teacher, state.student, *state.generators.values(), *state.saved_networks.values(), state.observer.network]
    tensors = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    tensors += [state.images, state.logits, state.latents, state.labels]
    for optimizer in (state.student_optimizer, state.generator_optimizer):
        tensors += [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    storages = WeakIdKeyDictionary({storage: storage.nbytes() for storage in _storages(tensors)})
    return sum(storages.values())


@contextmanager
def _gpu_kernels() -> Iterator[None]:
    """Context manager in which CPU tensors of any size use the fused kernels, with as many blocks, as GPU tensors do."""
    sizes, blocks = dict(dispatch.MIN_NUMEL), dict(moments.BLOCKS)
    dispatch.MIN_NUMEL.update(dict.fromkeys(sizes, 0))
    moments.BLOCKS["numba"] = blocks["cuda"]
    try:
        yield
    finally:
        dispatch.MIN_NUMEL.update(sizes)
        moments.BLOCKS.update(blocks)


@contextmanager
def _named_layers(state: TrainState) -> Iterator[list[Layer]]:
    """Context manager that yields a stack whose last element is the layer that is being called."""
    stack = [Layer()]
    layers = {
        module: Layer(role, name, type(module)) for role, network in _networks(state).items() for name, module in network.named_modules()
    }

    def enter(module: nn.Module, *_: Any) -> None:
        stack.append(layers.get(module, stack[-1]))

    def leave(*_: Any) -> None:
        stack.pop()

    # Hooks of all modules: fused batch norms call an activation that has hooks of its own, which runs a kernel more.
    with _removed(register_module_forward_pre_hook(enter)), _removed(register_module_forward_hook(leave, always_call=True)):
        yield stack


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _networks(state: TrainState) -> dict[str, nn.Module]:
    found = {"teacher": state.teacher, "student": state.student, **state.generators}
    if state.observer.network is not state.teacher:
        found["observed teacher"] = state.observer.network
    return found


class _Memory:
    """Memory of the tensors that are allocated by recorded operations and not yet freed."""

    def __init__(self) -> None:
        self.peak = 0
        self._live = WeakIdKeyDictionary()

    def record(self, arguments: object, result: object) -> None:
        """Add the storages of a result that are not those of the arguments."""
        known = WeakIdKeyDictionary(dict.fromkeys(_storages(arguments)))
        for storage in _storages(result):
            if storage not in known:
                self._live[storage] = storage.nbytes()
        self.peak = max(self.peak, sum(self._live.values()))


def _storages(tree: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Recorder(TorchDispatchMode):
    """Records the kernels of all operations.

    An operation of a backward pass belongs to the layer whose forward pass created its node: nodes have a sequence number, and the
    first operation after a node's creation is the layer's own.
    """

    def __init__(self, current: list[Layer]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: list[Launch] = []
        self.memory = _Memory()
        self._current = current
        self._layers: dict[int, Layer] = {}
        self._last = Layer()

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = operator(*arguments, **(keywords or {}))
        self.memory.record((arguments, keywords), result)
        layer, backward = self._layer()
        call = Call(operator, arguments, keywords or {}, result, layer.module)
        self.launches += [Launch(layer, backward, call.name, kernel) for kernel in kernels(call)]
        return result

    def _layer(self) -> tuple[Layer, bool]:
        if torch._C._current_graph_task_id() == -1:
            layer = self._current[-1]
            self._layers.setdefault(torch._C._autograd._get_sequence_nr() - 1, layer)
            return layer, False
        if torch._C._current_autograd_node() is not None:  # None while gradients of several consumers are added
            self._last = self._layers.get(torch._C._current_autograd_node()._sequence_nr(), self._last)
        return self._last, True
