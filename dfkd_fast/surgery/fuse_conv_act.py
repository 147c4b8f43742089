"""Fusion of a frozen network's convolutions with the residual and the activation that follow them."""

import operator
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from dfkd_fast.kernels import PartialMoments, bias_act, conv2d_relu

from .fold import trace
from .fuse_norm_act import has_hooks
from .modes import deep_copy, freeze

__all__ = ["ConvAct2d", "fuse_conv_acts"]

ACTIVATIONS: dict[Any, str] = {
    **dict.fromkeys((nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    **dict.fromkeys((nn.ReLU6, F.relu6), "relu6"),
    **dict.fromkeys((nn.SiLU, F.silu), "silu"),
    **dict.fromkeys((nn.Hardswish, F.hardswish), "hardswish"),
}
"""Names of activations for ``bias_act``, by class of module, function, and name of method."""
ADDITIONS_IN_PLACE = {operator.iadd, "add_"}
OPERATORS_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "iand", "ior", "ixor", "ipow", "imod", "ifloordiv", "imatmul")
ADDITIONS = {operator.add, torch.add, "add", *ADDITIONS_IN_PLACE}


class ConvAct2d(nn.Conv2d):
    """A frozen convolution with bias, optional residual and activation, made by :func:`fuse_conv_acts`.

    ``forward(x, residual=None)`` returns ``activation(conv(x) + bias + residual)``: with a ReLU in one call of
    :func:`~dfkd_fast.kernels.conv2d_relu`; otherwise, and if moments are recorded, with :func:`~dfkd_fast.kernels.bias_act`.
    """

    activation: str
    wide_bias: Tensor
    """The bias in float32."""
    moments: list[PartialMoments] | None
    """If it is a list, each call appends the partial moments of ``conv(x) + bias``."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        x = input.to(self.weight.dtype)
        geometry: Any = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}
        if self.activation == "relu" and self.moments is None:
            assert self.bias is not None
            return conv2d_relu(x, self.weight, self.bias, None if residual is None else residual.to(x.dtype), **geometry)
        output = F.conv2d(x, self.weight, None, **geometry)
        residual = None if residual is None else residual.to(output.dtype)
        activation: Any = self.activation
        if self.moments is None:
            return bias_act(output, self.wide_bias, residual, activation=activation)
        y, moments = bias_act(output, self.wide_bias, residual, activation=activation, moments=True)
        self.moments.append(moments)
        return y


def fuse_conv_acts(network: nn.Module, images: Tensor) -> tuple[nn.Module, int]:
    """Fuses the convolutions of a frozen network with the residual and the activation that follow them.

    A convolution is fused if the only consumer of its output is an activation or the sum with a tensor of the same shape. If both terms
    of a sum are convolutions, one of them adds the bias of both. Layers keep their names and dtypes.

    Args:
        network: network in evaluation mode; unchanged.
        images: example images (B, C, H, W).

    Returns:
        A traced copy, which shares all parameters except the biases that are added elsewhere, and the number of fused convolutions.

    Raises:
        FoldingError: the forward pass cannot be traced by torch.fx.
    """
    traced = trace(deep_copy(network, {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}))
    layers = dict(traced.named_modules())
    for node in traced.graph.nodes:
        if node.op == "call_module" and type(layers[node.target]) is nn.Identity:  # timm's blocks are full of them
            node.replace_all_uses_with(node.all_input_nodes[0])
            traced.graph.erase_node(node)
    traced.recompile()
    with torch.no_grad():
        ShapeProp(traced).propagate(images)
    nodes = list(traced.graph.nodes)
    # A layer that is called twice, or whose parameters are read elsewhere, must keep its bias.
    uses = Counter(node.target for node in nodes if node.op == "call_module")
    uses.update(str(node.target).rpartition(".")[0] for node in nodes if node.op == "get_attr")
    order = {node: index for index, node in enumerate(nodes)}
    changes = [order[node] for node in nodes if _is_in_place(node, layers)]
    fused = 0
    for node in nodes:
        if _is_convolution(node, layers) and uses[node.target] == 1 and len(node.users) == 1:
            end = order[next(iter(node.users))]
            moves_past_change = any(order[node] < change < end for change in changes)
            fused += _fuse(traced.graph, node, layers, uses, with_residual=not moves_past_change)
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    return freeze(traced), fused


def _is_convolution(node: fx.Node, layers: dict[str, nn.Module]) -> bool:
    """Whether a node calls a plain ``Conv2d`` whose padding is zeros and given as numbers."""
    layer = layers[str(node.target)] if node.op == "call_module" else None
    return type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str) and not has_hooks(layer)


def _is_in_place(node: fx.Node, layers: dict[str, nn.Module]) -> bool:
    """Whether a node may change a tensor that other nodes read."""
    if node.op == "call_module":
        return bool(getattr(layers[str(node.target)], "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    assigns = name.endswith("_") or name in OPERATORS_IN_PLACE or bool(node.kwargs.get("inplace"))
    return node.op in ("call_function", "call_method") and assigns


def _fuse(graph: fx.Graph, node: fx.Node, layers: dict[str, nn.Module], uses: Counter[Any], *, with_residual: bool) -> bool:
    """Fuses the convolution of a node with what consumes its output; returns whether there was something to fuse."""
    layer: Any = layers[str(node.target)]
    last, residual = node, _residual(node) if with_residual else None
    if residual is not None:
        (last,) = node.users
    activation = None
    if len(last.users) == 1:
        activation = _activation(consumer := next(iter(last.users)), layers)
        last = last if activation is None else consumer
    if last is node:
        return False
    consumed = [last, *last.all_input_nodes]
    bias = layer.weight.new_zeros(layer.out_channels) if layer.bias is None else layer.bias.detach()
    if residual is not None:
        if _is_convolution(residual, layers) and uses[residual.target] == 1 and len(residual.users) == 1:
            bias = bias + _without_bias(layers[str(residual.target)], layer)
        node.args = (*node.args, residual)
        last.prepend(node)
    layer.__class__ = ConvAct2d
    layer.activation, layer.moments = activation or "none", None
    layer.bias = nn.Parameter(bias, requires_grad=False)
    layer.register_buffer("wide_bias", bias.float(), persistent=False)
    last.replace_all_uses_with(node)
    for each in consumed:
        if each is not node and not each.users:
            graph.erase_node(each)
    return True


def _residual(node: fx.Node) -> fx.Node | None:
    """Returns the other term if the only consumer of a node's output adds a tensor of the same shape."""
    (consumer,) = node.users
    if consumer.op not in ("call_function", "call_method") or consumer.target not in ADDITIONS or consumer.kwargs:
        return None
    terms = consumer.args
    if len(terms) != 2 or not all(isinstance(term, fx.Node) for term in terms) or terms[0] is terms[1]:
        return None
    if consumer.target in ADDITIONS_IN_PLACE and terms[0] is not node:  # changes a tensor that other nodes may read
        return None
    first, second = (term.meta.get("tensor_meta") for term in terms if isinstance(term, fx.Node))
    if first is None or second is None or first.shape != second.shape:
        return None
    return next(term for term in terms if isinstance(term, fx.Node) and term is not node)


def _activation(node: fx.Node, layers: dict[str, nn.Module]) -> str | None:
    """Returns the name of the activation that a node computes; None if it is not one of :data:`ACTIVATIONS`."""
    if len(node.all_input_nodes) != 1 or node.op not in ("call_module", "call_function", "call_method"):
        return None
    if node.op == "call_module":
        layer = layers[str(node.target)]
        return None if has_hooks(layer) else ACTIVATIONS.get(type(layer))
    return ACTIVATIONS.get(node.target)


def _without_bias(term: Any, layer: Any) -> Tensor | float:
    """Removes the bias of a convolution, which another layer adds to the sum of both, and returns it; 0 without bias."""
    if term.bias is None:
        return 0.0
    bias: Tensor = term.bias.detach()
    term.bias = None
    # The recorded moments are those of this layer without its bias, and of the other layer with both.
    term.register_buffer("mean_shift", -bias.float(), persistent=False)
    layer.register_buffer("mean_shift", bias.float(), persistent=False)
    return bias
