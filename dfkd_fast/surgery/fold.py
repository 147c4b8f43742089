"""Batch norms folded into convolutions, and whether a network is the same without them."""

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

__all__ = ["FoldingError", "fold", "fold_and_verify", "has_running_statistics"]

FOLDED_WITHIN = 1e-3
"""Of the largest logit: rounding is far below, a network whose forward a trace does not catch is far above."""


def has_running_statistics(layer: nn.Module) -> bool:
    """Whether a layer is a batch norm that keeps running statistics: PyTorch's, a frozen one of torchvision or timm, or a user's own.

    Instance norms keep them as well, but of every image alone.
    """
    if isinstance(layer, _InstanceNorm | torch.jit.ScriptModule):  # a compiled layer cannot be looked into
        return False
    return all(isinstance(getattr(layer, name, None), Tensor) for name in ("running_mean", "running_var"))


class FoldingError(Exception):
    """A network's batch norms cannot be folded; the message is one line."""


def fold(network: nn.Module) -> nn.Module:
    """A copy of a frozen network whose batch norms are folded into the convolutions before them, in the precision of its weights.

    Only what the copy's graph shows to be a convolution whose sole reader is a batch norm is folded; other batch norms, such
    as those of pre-activation blocks, stay. In-place operations become ordinary ones, so that the outputs of the folded
    convolutions can be looked at (:class:`Observer`).

    Args:
        network: in evaluation mode.

    Raises:
        FoldingError: its forward cannot be traced (it branches on its input, say), or it has nothing to fold.
    """
    try:
        own = _without_timms_pairs(deep_copy(network))
        traced = fx.GraphModule(own, _Tracer().trace(own))
    except Exception as error:  # a tracer runs the user's code
        raise FoldingError(f"{type(network).__name__} cannot be traced: {first_line(error)}") from error
    layers = dict(traced.named_modules())
    uses = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    folded = 0
    for node in traced.graph.nodes:
        if node.op == "call_function" and node.target is operator.iadd:
            node.target = operator.add
        elif "inplace" in node.kwargs:
            node.kwargs = {**node.kwargs, "inplace": False}
        elif node.op == "call_module" and _is_batch_norm(norm := layers[node.target]) and has_running_statistics(norm):
            before = next(iter(node.all_input_nodes))
            conv = layers.get(before.target) if before.op == "call_module" else None
            # Its output must go nowhere else, and neither layer may serve a second place.
            if (
                isinstance(conv, nn.Conv2d)
                and _is_ordinary(conv)
                and len(before.users) == 1
                and uses.count(before.target) == uses.count(node.target) == 1
            ):
                fused: Any = fuse_conv_bn_eval(conv, norm)
                fused.folded_norm = norm.requires_grad_(False)
                parent, _, name = before.target.rpartition(".")
                setattr(traced.get_submodule(parent), name, fused)
                node.replace_all_uses_with(before)
                traced.graph.erase_node(node)
                folded += 1
    if not folded:
        raise FoldingError(f"{type(network).__name__} has no convolution that a batch norm alone reads")
    for layer in traced.modules():
        if hasattr(layer, "inplace"):
            setattr(layer, "inplace", False)  # noqa: B010  # a field that not every module has
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    return freeze(traced)


class _Tracer(fx.Tracer):
    """Takes convolutions, poolings and frozen batch norms as a whole: timm's, which pad as TensorFlow does, look at their input's size."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = isinstance(m, nn.Conv2d | nn.AvgPool2d | nn.MaxPool2d) or _is_batch_norm(m)
        return whole or super().is_leaf_module(m, module_qualified_name)


def _is_batch_norm(layer: nn.Module) -> bool:
    """Whether it is PyTorch's batch norm of images, or torchvision's frozen one."""
    from torchvision.ops import FrozenBatchNorm2d  # a second to import, and not needed before there is a network

    return isinstance(layer, nn.BatchNorm2d | FrozenBatchNorm2d)


def _is_ordinary(layer: nn.Conv2d) -> bool:
    """Whether it convolves with its weight as it is, so that a factor on its output is one on the weight."""
    computed = "weight" not in layer._parameters  # by a hook at every call, as torch.nn.utils.weight_norm has it
    return not computed and (type(layer) in (nn.Conv2d, CpuConv2d) or type(layer).__name__ == "Conv2dSame")


def fold_and_verify(network: nn.Module, images: Tensor) -> nn.Module:
    """:func:`fold`, and a look at whether the copy answers some images (B, C, H, W) as the network does.

    Both answer in float64: on a GPU, float32 convolutions in TF32 differ by more than a wrong fold may.

    Raises:
        FoldingError: it cannot be folded, the copy answers something else, or the network does not run in float64.
    """
    folded = fold(network)
    with torch.no_grad():
        try:
            expected, answer = (deep_copy(each).double()(images.double()) for each in (network, folded))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise FoldingError(f"{type(network).__name__} does not run in float64, to be compared there: {first_line(error)}") from error
        difference = (answer - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    if not difference < FOLDED_WITHIN:
        raise FoldingError(f"{type(network).__name__} answers otherwise once folded, by {difference.item():.1g} of its largest logit")
    return folded


def _without_timms_pairs(network: nn.Module) -> nn.Module:
    """timm's BatchNormAct2d, a batch norm with its activation inside, as two layers in a row."""
    for parent in list(network.modules()):
        for name, layer in parent.named_children():
            if type(layer).__name__ == "BatchNormAct2d":
                pair: Any = layer
                norm = nn.BatchNorm2d(pair.num_features, pair.eps, pair.momentum, pair.affine)
                norm.load_state_dict(pair.state_dict())
                setattr(parent, name, nn.Sequential(norm, pair.drop, pair.act).to(pair.running_mean.device).eval())
    return network
