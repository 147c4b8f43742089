"""Folding of batch norms into convolutions, with a check of the folded network's outputs."""

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dfkd_fast.errors import first_line
from dfkd_fast.out_of_memory import is_out_of_memory

from .cpu_conv import CpuConv2d
from .modes import deep_copy, freeze
from .precision import Float32Layer

__all__ = ["FoldingError", "fold", "fold_and_verify", "has_running_statistics", "trace"]

FOLD_TOLERANCE = 1e-3
"""Largest difference between the logits of a folded and the original network, relative to the largest logit.

Rounding errors are far below, errors from a forward pass that was traced incorrectly are far above."""


def has_running_statistics(layer: nn.Module) -> bool:
    """Returns True if a layer is a batch norm with running statistics, whether PyTorch's, torchvision's, timm's or a user's.

    Instance norms may have running statistics too, but normalize every image separately.
    """
    if isinstance(layer, _InstanceNorm | torch.jit.ScriptModule):  # inputs of scripted layers cannot be recorded
        return False
    return all(isinstance(getattr(layer, name, None), Tensor) for name in ("running_mean", "running_var"))


class FoldingError(Exception):
    """A network's batch norms cannot be folded; the message is one line."""


def fold(network: nn.Module) -> nn.Module:
    """Returns a frozen copy of a network whose batch norms are folded into the preceding convolutions.

    A batch norm is folded only if the traced graph shows that it is the only consumer of a convolution's output; other batch norms,
    such as those of pre-activation blocks, stay. In-place operations are replaced by out-of-place ones, so that
    :class:`Observer` can record the outputs of the folded convolutions. The weights keep their dtype.

    Args:
        network: a network in evaluation mode; unchanged.

    Raises:
        FoldingError: the forward pass cannot be traced by torch.fx, for example because it branches on its input, or there is no
            batch norm to fold.
    """
    try:
        copied = _split_batch_norm_act(deep_copy(network))
    except Exception as error:  # attributes of a user's network
        raise FoldingError(f"{type(network).__name__} cannot be traced: {first_line(error)}") from error
    traced = trace(copied)
    layers = dict(traced.named_modules())
    uses = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    folded = 0
    for node in traced.graph.nodes:
        if node.op == "call_function" and node.target is operator.iadd:
            node.target = operator.add
        elif "inplace" in node.kwargs:
            node.kwargs = {**node.kwargs, "inplace": False}
        elif node.op == "call_module" and _is_batch_norm(norm := layers[node.target]) and has_running_statistics(norm):
            producer = next(iter(node.all_input_nodes))
            conv = layers.get(producer.target) if producer.op == "call_module" else None
            # The convolution's output must have no other consumer, and neither layer may be called twice.
            if (
                isinstance(conv, nn.Conv2d)
                and _is_foldable(conv)
                and len(producer.users) == 1
                and uses.count(producer.target) == uses.count(node.target) == 1
            ):
                fused: Any = fuse_conv_bn_eval(conv, norm)
                fused.folded_norm = norm.requires_grad_(False)
                parent, _, name = producer.target.rpartition(".")
                setattr(traced.get_submodule(parent), name, fused)
                node.replace_all_uses_with(producer)
                traced.graph.erase_node(node)
                folded += 1
    if not folded:
        raise FoldingError(f"{type(network).__name__} has no convolution that only a batch norm consumes")
    for layer in traced.modules():
        if hasattr(layer, "inplace"):
            setattr(layer, "inplace", False)  # noqa: B010  # an attribute that not every module has
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    return freeze(traced)


def trace(network: nn.Module) -> fx.GraphModule:
    """Returns a module with the layers of a network and a traced forward pass.

    Raises:
        FoldingError: the forward pass cannot be traced by torch.fx.
    """
    try:
        return fx.GraphModule(network, _Tracer().trace(network))
    except Exception as error:  # tracing runs the user's code
        raise FoldingError(f"{type(network).__name__} cannot be traced: {first_line(error)}") from error


class _Tracer(fx.Tracer):
    """Does not trace into convolutions, pooling and frozen batch norms: timm's layers with TensorFlow padding depend on the input size.

    Nor into layers in float32, which disable autocast.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_leaf = isinstance(m, nn.Conv2d | nn.AvgPool2d | nn.MaxPool2d | Float32Layer) or _is_batch_norm(m)
        return is_leaf or super().is_leaf_module(m, module_qualified_name)


def _is_batch_norm(layer: nn.Module) -> bool:
    """Returns True for PyTorch's ``BatchNorm2d`` and torchvision's ``FrozenBatchNorm2d``."""
    from torchvision.ops import FrozenBatchNorm2d  # takes a second to import and is rarely needed

    return isinstance(layer, nn.BatchNorm2d | FrozenBatchNorm2d)


def _is_foldable(layer: nn.Conv2d) -> bool:
    """Returns True if a layer convolves with its weight parameter unchanged, so that scaling the weight scales the output."""
    reparametrized = "weight" not in layer._parameters  # computed by a hook at every call, as in torch.nn.utils.weight_norm
    return not reparametrized and (type(layer) in (nn.Conv2d, CpuConv2d) or type(layer).__name__ == "Conv2dSame")


def fold_and_verify(network: nn.Module, images: Tensor) -> nn.Module:
    """Folds a network with :func:`fold` and verifies that the copy has the same outputs.

    Outputs are compared in float64, because on GPUs the rounding of TF32 convolutions exceeds the tolerance.

    Args:
        network: a network in evaluation mode, images → logits; unchanged.
        images: images (B, C, H, W) for the comparison.

    Returns:
        The folded copy.

    Raises:
        FoldingError: the network cannot be folded, the copy's outputs differ, or the network does not run in float64.
    """
    folded = fold(network)
    with torch.no_grad():
        try:
            expected, actual = (deep_copy(each).double()(images.double()) for each in (network, folded))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            problem = f"does not run in float64, in which folding is verified: {first_line(error)}"
            raise FoldingError(f"{type(network).__name__} {problem}") from error
        difference = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    if not difference < FOLD_TOLERANCE:
        raise FoldingError(f"folding changes the outputs of {type(network).__name__} by {difference.item():.1g} of its largest logit")
    return folded


def _split_batch_norm_act(network: nn.Module) -> nn.Module:
    """Replaces timm's BatchNormAct2d by a batch norm followed by its activation, in place; returns the network."""
    for parent in list(network.modules()):
        for name, layer in parent.named_children():
            if type(layer).__name__ == "BatchNormAct2d":
                norm_act: Any = layer
                norm = nn.BatchNorm2d(norm_act.num_features, norm_act.eps, norm_act.momentum, norm_act.affine)
                norm.load_state_dict(norm_act.state_dict())
                setattr(parent, name, nn.Sequential(norm, norm_act.drop, norm_act.act).to(norm_act.running_mean.device).eval())
    return network
