"""Fusion of batch norms in training with the residual and the activation that follow them, and with the bias before them."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch.distributed
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from dfkd_fast.kernels import batch_norm_act
from dfkd_fast.kernels.norm import NormActivation
from dfkd_fast.kernels.norm.reference import activate

from .graphs import Activation, activation_of, activation_of_layer, erase_identities, has_hooks, is_in_place, terms
from .tracing import callers, generated_forward, has_plain_signature, trace_forward

__all__ = ["BatchNormAct2d", "ConvBeforeNorm", "fuse_norm_acts"]


class BatchNormAct2d(_BatchNorm):
    """Mixin of batch norms that :func:`fuse_norm_acts` fuses; parameters, buffers and hooks are those of the batch norm.

    ``forward(x, residual, input_bias, activation, negative_slope)`` returns ``activation(batch_norm(x + input_bias) + residual)``
    computed by :func:`~dfkd_fast.kernels.batch_norm_act`. ``activation`` is a name or a layer; a layer that has got hooks is called.
    Only rewritten forward passes pass more than ``x``; called as before, the
    layer computes what it did before.
    """

    activation: Activation
    """Activation of the layer itself: "none", unless it is timm's ``BatchNormAct2d``."""

    def forward(
        self,
        input: Tensor,
        residual: Tensor | float | None = None,
        input_bias: Tensor | None = None,
        activation: NormActivation | nn.Module | None = None,
        negative_slope: float = 0.01,
    ) -> Tensor:
        if isinstance(self, nn.SyncBatchNorm) and input.ndim != 4:  # converted from a batch norm of other images, never fused
            return super().forward(input)
        if isinstance(activation, nn.Module):
            found = None if has_hooks(activation) else activation_of_layer(activation)
            if found is None:  # the layer has changed since the fusion
                normalized = self._fused(input, None, input_bias, "none", 0.0)
                return activation(normalized if residual is None else normalized + residual)
            activation, negative_slope = found
        name, slope = self.activation if activation is None else (activation, negative_slope)
        if residual is None or (isinstance(residual, Tensor) and (residual.shape, residual.dtype) == (input.shape, input.dtype)):
            return self._fused(input, residual, input_bias, name, slope)
        return activate(self._fused(input, None, input_bias, "none", slope) + residual, name, slope)  # broadcast or promoted

    def _fused(
        self, input: Tensor, residual: Tensor | None, input_bias: Tensor | None, activation: NormActivation, negative_slope: float
    ) -> Tensor:
        reads_running = not self.training or self.track_running_stats
        tracked = self.num_batches_tracked if self.training and self.track_running_stats else None
        return batch_norm_act(
            input,
            self.running_mean if reads_running else None,
            self.running_var if reads_running else None,
            self.weight,
            self.bias,
            residual,
            training=self.training or self.running_mean is None,
            momentum=0.0 if self.momentum is None and tracked is None else self.momentum,
            eps=self.eps,
            activation=activation,
            negative_slope=negative_slope,
            num_batches_tracked=tracked,
            input_bias=input_bias,
            group=_group(self),
        )


class ConvBeforeNorm(_ConvNd):
    """Mixin of convolutions whose bias a batch norm may add; with ``with_bias=False`` it is not added here."""

    def forward(self, input: Tensor, *args: Any, with_bias: bool = True) -> Tensor:
        if with_bias:
            return super().forward(input, *args)
        if isinstance(self, nn.ConvTranspose2d):
            geometry: Any = self.stride, self.padding, self.output_padding, self.groups, self.dilation
            return F.conv_transpose2d(input, self.weight, None, *geometry)
        convolve: Any = self._conv_forward
        return convolve(input, self.weight, None)


def fuse_norm_acts(network: nn.Module, *, every_norm: bool = False, skip_biases: bool = False) -> int:
    """Fuses the batch norms of a network with the residual and the activation that follow them, in place.

    The forward pass of each module that contains such a pattern is traced by torch.fx and replaced by the trace, which calls
    :class:`BatchNormAct2d`; submodules whose forward passes are not part of a pattern are called as before. Modules that cannot be
    traced, compiled modules, and layers with hooks are left alone. The modules, their names, parameters and buffers do not change.

    A batch norm is fused with an addition or an activation that is the only consumer of its output. As in any trace, what the
    rewritten forward passes do besides computing their result, such as logging, is lost, and numbers that they read from attributes
    or global variables are those of the trace. Networks with such forward passes cannot be pickled, only copied and saved by their
    state dict.

    Args:
        network: the network; only the classes of its modules change.
        every_norm: use the kernel for batch norms without anything to fuse too.
        skip_biases: let a batch norm add the bias of the convolution before it, to its mean. In training the bias changes nothing
            but the running mean, and its gradient is 0.

    Returns:
        The number of batch norms that use the kernel.
    """
    fusion = _Fusion(network, skip_biases)
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for module in reversed(fusion.containers):  # submodules before the modules that contain them
        if (forward := fusion.fused_forward(module)) is not None:
            forwards[module] = forward
    for module, forward in forwards.items():
        kind: Any = type(module)
        module.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    for conv in fusion.convs:
        conv.__class__ = _with_mixin(ConvBeforeNorm, type(conv))  # type: ignore[arg-type]  # mypy asks the class for its instances' hash
    fused = {norm: own for norm, own in fusion.norms.items() if every_norm or own.name != "none" or norm in fusion.fused}
    for norm, own in fused.items():
        norm.__class__ = _with_mixin(BatchNormAct2d, type(norm))  # type: ignore[arg-type]
        setattr(norm, "activation", own)  # noqa: B010  # an attribute of the new class
    return len(fused)


class _Pattern(NamedTuple):
    """Nodes that a batch norm is fused with."""

    norm: fx.Node
    conv: fx.Node | None
    """The convolution whose bias the batch norm adds."""
    addition: fx.Node | None
    activation: fx.Node | None

    @property
    def nodes(self) -> list[fx.Node]:
        return [node for node in self if node is not None]


class _Fusion:
    """The fusion of one network, whose modules do not change before it is complete."""

    def __init__(self, network: nn.Module, skip_biases: bool) -> None:
        self.skip_biases = skip_biases
        modules = list(_modules(network))
        self.norms = {module: own for module in modules if (own := _own_activation(module)) is not None}
        self.containers = [module for module in modules if module not in self.norms and self.norms.keys() & set(module.modules())]
        self.inlinable = {module for module in self.containers if not has_hooks(module)}
        self.rewritable: set[nn.Module] = set()
        self.fused: set[nn.Module] = set()
        self.convs: dict[nn.Module, None] = {}

    def fused_forward(self, module: nn.Module) -> Callable[..., Any] | None:
        """Returns the forward pass of a module with fused batch norms; None if it cannot be traced or fuses nothing of its own."""
        if not has_plain_signature(module):
            return None
        graph = trace_forward(module, self.inlinable)
        if graph is None:  # a submodule may be the reason
            graph = trace_forward(module, self.inlinable & self.rewritable)
        if graph is None:
            return None
        self.rewritable.add(module)
        patterns = [pattern for pattern in self._patterns(module, graph) if self._owner(pattern, module) is module]
        # Other submodules stay modules of their own: their hooks run, and what their forward passes do besides the result happens.
        inlined = {caller for pattern in patterns for node in pattern.nodes for caller in callers(node)}
        if not patterns or (graph := trace_forward(module, inlined)) is None:
            return None
        layers = dict(module.named_modules())
        for pattern in self._patterns(module, graph):
            self.fused.add(layers[str(pattern.norm.target)])
            if pattern.conv is not None:
                self.convs[layers[str(pattern.conv.target)]] = None
            _apply(pattern, graph, layers)
        return generated_forward(module, graph)

    def _owner(self, pattern: _Pattern, module: nn.Module) -> nn.Module:
        """Returns the innermost module that calls all nodes of a pattern and whose forward pass can be replaced."""
        owner = module
        for level in zip(*(callers(node) for node in pattern.nodes), strict=False):
            if len(set(level)) > 1:
                break
            owner = level[0] if level[0] in self.rewritable else owner
        return owner

    def _patterns(self, module: nn.Module, graph: fx.Graph) -> list[_Pattern]:
        """Returns the patterns of a graph, from which it removes ``Identity`` layers."""
        layers = dict(module.named_modules())
        erase_identities(graph, layers)
        order = {node: index for index, node in enumerate(graph.nodes)}
        changes = [order[node] for node in graph.nodes if is_in_place(node, layers)]
        patterns: list[_Pattern] = []
        additions: set[fx.Node] = set()
        # Of two batch norms in a sum the last one adds the residual, because its input must not change until the addition.
        for node in reversed(graph.nodes):
            own = self.norms.get(layers[str(node.target)]) if node.op == "call_module" else None
            if own is None or len(node.args) + len(node.kwargs) != 1 or len(node.all_input_nodes) != 1:
                continue
            conv, addition, activation = node.all_input_nodes[0], _only_consumer(node), None
            if addition is not None and (own.name != "none" or addition in additions or terms(node, addition) is None):
                addition = None
            if addition is not None and any(order[node] < change < order[addition] for change in changes):
                addition = None
            if own.name == "none":
                activation = _only_consumer(node if addition is None else addition)
            pattern = _Pattern(
                node,
                conv if self.skip_biases and len(conv.users) == 1 and _has_separable_bias(conv, layers) else None,
                addition,
                None if activation is None or activation_of(activation, layers) is None else activation,
            )
            if len(pattern.nodes) > 1:
                patterns.append(pattern)
                additions |= set() if addition is None else {addition}
        return patterns


def _modules(network: nn.Module) -> Iterator[nn.Module]:
    """Yields the modules that may change: not those that PyTorch compiles, which fuses better, or has compiled."""
    pending, visited = [network], set[nn.Module]()
    while pending:
        module = pending.pop()
        compiled = module._compiled_call_impl is not None or "_orig_mod" in module._modules
        if module not in visited and not compiled and not isinstance(module, torch.jit.ScriptModule):
            yield module
            pending += reversed(list(module.children()))
        visited.add(module)


def _own_activation(layer: nn.Module) -> Activation | None:
    """Returns the activation that a batch norm layer applies itself; None for layers that cannot be fused."""
    if not isinstance(layer, _BatchNorm) or has_hooks(layer) or "forward" in vars(layer):
        return None
    if not layer.eps > 0 or not (layer.momentum is None or 0 <= layer.momentum <= 1):  # PyTorch's layers do not check them
        return None
    if type(layer) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return Activation("none")
    norm_act: Any = layer
    if type(layer).__name__ == "BatchNormAct2d" and type(norm_act.drop) is nn.Identity and not any(map(has_hooks, layer.children())):
        return activation_of_layer(norm_act.act)
    return None


def _only_consumer(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _has_separable_bias(node: fx.Node, layers: dict[str, nn.Module]) -> bool:
    """Returns True if a node calls a convolution that adds its bias parameter last."""
    layer: Any = layers[str(node.target)] if node.op == "call_module" else None
    # Subclasses that only replace _conv_forward, which takes the bias as an argument, are included.
    if getattr(type(layer), "forward", None) not in (nn.Conv2d.forward, nn.ConvTranspose2d.forward) or "forward" in vars(layer):
        return False
    return layer._parameters.get("bias") is not None and not has_hooks(layer) and len(node.args) + len(node.kwargs) == 1


def _apply(pattern: _Pattern, graph: fx.Graph, layers: dict[str, nn.Module]) -> None:
    """Replaces the nodes of a pattern by one call of the batch norm."""
    node, conv, addition, activation = pattern
    bias = residual = None
    if conv is not None:
        conv.kwargs = {**conv.kwargs, "with_bias": False}
        with graph.inserting_before(node):
            bias = graph.get_attr(f"{conv.target}.bias")  # at every call, since it may be replaced
    last = node
    if addition is not None:
        first, second = addition.all_input_nodes
        residual, last = second if first is node else first, addition
        addition.prepend(node)
    arguments: dict[str, Any] = {"residual": residual, "input_bias": bias}
    if activation is not None:
        found = activation_of(activation, layers)
        assert found is not None
        if activation.op == "call_module":
            with graph.inserting_before(node):
                arguments["activation"] = graph.get_attr(str(activation.target))  # at every call, since it may change
        else:
            arguments |= {"activation": found.name} | ({"negative_slope": found.negative_slope} if found.name == "leaky_relu" else {})
        last = activation
    node.args, node.kwargs = (node.all_input_nodes[0],), {name: value for name, value in arguments.items() if value is not None}
    last.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    for each in (activation, addition):
        if each is not None:
            graph.erase_node(each)


def _group(norm: _BatchNorm) -> "torch.distributed.ProcessGroup | None":
    """Returns the processes over which a batch norm computes its statistics; None for its own process only."""
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training or not torch.distributed.is_available():
        return None
    return (norm.process_group or torch.distributed.group.WORLD) if torch.distributed.is_initialized() else None


@cache  # compiled networks have guards on the classes of their layers: a new class in every call would recompile them
def _with_mixin(mixin: type[nn.Module], layer: type[nn.Module]) -> type[nn.Module]:
    return layer if issubclass(layer, mixin) else type(layer.__name__, (mixin, layer), {"__module__": layer.__module__})
