"""Traces of the forward passes of a network's modules by torch.fx, which run the user's code on copies of the modules."""

import inspect
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError

from dfkd_fast.errors import USER_CODE_ERRORS, DfkdError
from dfkd_fast.out_of_memory import is_out_of_memory

from .graphs import OPERATORS_IN_PLACE
from .modes import deep_copy

__all__ = ["callers", "generated_forward", "has_plain_signature", "trace_forward"]


def has_plain_signature(module: nn.Module) -> bool:
    """Returns True if ``forward`` requires all of its arguments: a trace takes the branch of an optional argument that is given."""
    if "forward" in vars(module):
        return False
    try:
        _, *parameters = inspect.signature(type(module).forward).parameters.values()
    except (ValueError, TypeError):
        return False
    return all(each.kind is each.POSITIONAL_OR_KEYWORD and each.default is each.empty for each in parameters)


def trace_forward(module: nn.Module, inlined: Collection[nn.Module]) -> fx.Graph | None:
    """Traces the forward pass of a module, whose targets are qualified names in the module.

    Args:
        module: the module, unchanged.
        inlined: submodules whose own forward passes are traced; other submodules are called.

    Returns:
        The graph; None if it would compute something else than the module: the forward pass fails with the proxies of torch.fx,
        depends on the training mode or on whether gradients are enabled, creates tensors that do not depend on its arguments, changes
        attributes, runs operations in contexts such as ``torch.no_grad()``, ``torch.autocast`` and checkpoints, or
        an attribute cannot be copied.
    """
    try:
        trial = deep_copy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})
    except DfkdError:  # an attribute, such as a process group, cannot be copied
        return None
    originals = dict(zip(trial.modules(), module.modules(), strict=True))
    graphs = []
    for training in (True, False):
        for each in trial.modules():
            if not isinstance(each, torch.jit.ScriptModule):
                each.training = training
        before = list(_attributes(trial))
        try:
            with torch.set_grad_enabled(training):
                graphs.append(_Tracer(originals, inlined).trace(trial))
        except USER_CODE_ERRORS as error:
            if is_out_of_memory(error):
                raise
            return None
        after = list(_attributes(trial))  # tensors that torch.fx takes for constants are attributes too
        if len(before) != len(after) or not all(one is other for one, other in zip(before, after, strict=True)):
            return None
    in_training, in_evaluation = (graph.python_code("self").src for graph in graphs)
    return graphs[0] if in_training == in_evaluation else None


def callers(node: fx.Node) -> list[nn.Module]:
    """Returns the submodules through whose forward passes a node of :func:`trace_forward` is called, outermost first."""
    return list(node.meta.get("callers", ()))


def generated_forward(module: nn.Module, graph: fx.Graph) -> Callable[..., Any]:
    """Returns a function that computes the graph for its first argument, which is ``module`` or a copy of it."""
    graph.lint()
    return type(fx.GraphModule(module, graph)).forward


def _recorded(name: str) -> Callable[[fx.Proxy, Any], Any]:
    """Returns the method of a proxy for an operator in place, such as ``+=``.

    torch.fx itself records ``x += y`` as ``x + y``; its code for ``operator.iadd`` would also change a number that is read again.
    """

    def assign(target: Any, value: Any) -> Any:
        return getattr(operator, name)(target, value)

    assign.__name__ = name
    return lambda self, value: self.tracer.create_proxy("call_function", assign, (self, value), {})


_Proxy = type("_Proxy", (fx.Proxy,), {f"__{name}__": _recorded(name) for name in OPERATORS_IN_PLACE})


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # otherwise an operation on buffers alone would run in the trace only

    def __init__(self, originals: Mapping[nn.Module, nn.Module], inlined: Collection[nn.Module]) -> None:
        super().__init__()
        self.originals, self.inlined = originals, inlined
        self.callers: list[nn.Module] = []
        self.contexts = _contexts()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.originals[m] not in self.inlined

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.is_leaf_module(m, ""):
            return super().call_module(m, forward, args, kwargs)
        self.callers.append(self.originals[m])
        result = super().call_module(m, forward, args, kwargs)
        self.callers.pop()
        return result

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _contexts() != self.contexts:
            raise TraceError("the graph would not contain the context manager in which an operation runs")
        node = super().create_node(*args, **kwargs)
        node.meta["callers"] = tuple(self.callers)
        return node


def _contexts() -> tuple[object, ...]:
    """Returns the state of the context managers that operations depend on."""
    torch.autocast_increment_nesting()
    autocasts = torch.autocast_decrement_nesting()
    checkpointing = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocasts, checkpointing


def _attributes(network: nn.Module) -> Iterator[object]:
    """Yields the attributes of all modules and the elements of their containers."""
    for module in network.modules():
        for value in vars(module).values():
            yield value
            if isinstance(value, list | dict | set):
                yield from value.values() if isinstance(value, dict) else value
