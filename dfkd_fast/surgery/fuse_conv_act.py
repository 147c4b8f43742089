"""Fusion of a frozen network's convolutions with the residual and the activation that follow them."""

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from dfkd_fast.kernels import PartialMoments, bias_act, conv2d_relu

from .fold import trace
from .graphs import activation_of, erase_identities, has_hooks, is_in_place, terms
from .modes import deep_copy, freeze

__all__ = ["ConvAct2d", "fuse_conv_acts"]


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
    erase_identities(traced.graph, layers)
    traced.recompile()
    with torch.no_grad():
        ShapeProp(traced).propagate(images)
    nodes = list(traced.graph.nodes)
    # A layer that is called twice, or whose parameters are read elsewhere, must keep its bias.
    uses = Counter(node.target for node in nodes if node.op == "call_module")
    uses.update(str(node.target).rpartition(".")[0] for node in nodes if node.op == "get_attr")
    order = {node: index for index, node in enumerate(nodes)}
    changes = [order[node] for node in nodes if is_in_place(node, layers)]
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


def _fuse(graph: fx.Graph, node: fx.Node, layers: dict[str, nn.Module], uses: Counter[Any], *, with_residual: bool) -> bool:
    """Fuses the convolution of a node with what consumes its output; returns whether there was something to fuse."""
    layer: Any = layers[str(node.target)]
    last = addition = node
    residual = _residual(node) if with_residual else None
    if residual is not None:
        (addition,) = node.users
        last = addition
    activation: str | None = None
    if len(last.users) == 1:
        found = activation_of(consumer := next(iter(last.users)), layers)
        if found is not None and found.name not in ("none", "leaky_relu"):  # bias_act has no leaky ReLU
            activation, last = found.name, consumer
    if last is node:
        return False
    consumed = [last, *last.all_input_nodes]
    bias = layer.weight.new_zeros(layer.out_channels) if layer.bias is None else layer.bias.detach()
    if residual is not None:
        if _is_convolution(residual, layers) and uses[residual.target] == 1 and len(residual.users) == 1:
            bias = bias + _without_bias(layers[str(residual.target)], layer)
        node.args = (*node.args, residual)
        addition.prepend(node)  # not later: the residual may change after it was added
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
    if (pair := terms(node, consumer)) is None:
        return None
    first, second = (term.meta.get("tensor_meta") for term in pair)
    if first is None or second is None or first.shape != second.shape:
        return None
    return pair[1] if pair[0] is node else pair[0]


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
