"""What the fusions of layers have in common: how they recognize the nodes of a traced forward pass."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from dfkd_fast.kernels.norm import NormActivation

__all__ = [
    "OPERATORS_IN_PLACE",
    "Activation",
    "activation_of",
    "activation_of_layer",
    "erase_identities",
    "has_hooks",
    "is_in_place",
    "terms",
]

OPERATORS_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "iand", "ior", "ixor", "ipow", "imod", "ifloordiv", "imatmul")
"""Names of the operators of assignments such as ``x += y``."""
ADDITIONS = ("add", "iadd", "add_")
ACTIVATIONS: dict[Any, NormActivation] = {
    **dict.fromkeys((nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    **dict.fromkeys((nn.LeakyReLU, F.leaky_relu, F.leaky_relu_), "leaky_relu"),
    **dict.fromkeys((nn.ReLU6, F.relu6), "relu6"),
    **dict.fromkeys((nn.SiLU, F.silu), "silu"),
    **dict.fromkeys((nn.Hardswish, F.hardswish), "hardswish"),
}
"""Names of activations in the kernels, by class of module, function, and name of method."""


class Activation(NamedTuple):
    """Arguments of the kernels for an activation."""

    name: NormActivation
    negative_slope: float = 0.01
    """Slope of a leaky ReLU for negative inputs."""


def has_hooks(layer: nn.Module) -> bool:
    """Returns True if a layer has hooks of its forward or backward pass, which a fused layer would not call."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def is_in_place(node: fx.Node, layers: Mapping[str, nn.Module]) -> bool:
    """Returns True if a node may change a tensor that other nodes read."""
    if node.op == "call_module":
        return any(getattr(layer, "inplace", False) for layer in layers[str(node.target)].modules())
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    assigns = name.endswith("_") or name in OPERATORS_IN_PLACE or bool(node.kwargs.get("inplace")) or "out" in node.kwargs
    return node.op in ("call_function", "call_method") and assigns


def erase_identities(graph: fx.Graph, layers: Mapping[str, nn.Module]) -> None:
    """Removes the layers that only return their input, of which timm's blocks are full."""
    for node in graph.nodes:
        layer = layers[str(node.target)] if node.op == "call_module" else None
        if type(layer) is nn.Identity and not has_hooks(layer):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)


def terms(node: fx.Node, consumer: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Returns the two terms if a consumer of a node adds another node to it; None if it does something else."""
    name = consumer.target if consumer.op == "call_method" else getattr(consumer.target, "__name__", "")
    if consumer.op not in ("call_function", "call_method") or name not in ADDITIONS or len(consumer.args) != 2 or consumer.kwargs:
        return None
    first, second = consumer.args
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first is second:
        return None
    if name != "add" and first is not node:  # changes a tensor that other nodes may read
        return None
    return first, second


def activation_of(node: fx.Node, layers: Mapping[str, nn.Module]) -> Activation | None:
    """Returns the activation that a node computes; None if it is not one of :data:`ACTIVATIONS`."""
    if len(node.all_input_nodes) != 1 or node.op not in ("call_module", "call_function", "call_method"):
        return None
    if node.op == "call_module":
        layer = layers[str(node.target)]
        return None if has_hooks(layer) else activation_of_layer(layer)
    slope = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
    return _activation(node.target, slope)


def activation_of_layer(layer: nn.Module) -> Activation | None:
    """Returns the activation that a layer computes; "none" for ``Identity``, None if it is not one of :data:`ACTIVATIONS`."""
    if "forward" in vars(layer):
        return None
    return Activation("none") if type(layer) is nn.Identity else _activation(type(layer), getattr(layer, "negative_slope", 0.01))


def _activation(target: Any, slope: Any) -> Activation | None:
    name = ACTIVATIONS.get(target)
    if name != "leaky_relu":
        return None if name is None else Activation(name)
    return Activation(name, slope) if isinstance(slope, int | float) and 0 <= slope < math.inf else None
