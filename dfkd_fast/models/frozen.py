"""The frozen teacher: it owes no gradient and never changes, its batch norms are folded, and what its layers see can be asked for."""

import copy
import itertools
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dfkd_fast.errors import DfkdError, first_line
from dfkd_fast.kernels import channel_moments

from .convolution import CpuConv2d
from .heads import compute_in_float32, find_heads

__all__ = ["FoldingError", "Observation", "Observer", "fold", "folded_and_checked", "freeze", "lower_precision"]


def freeze(network: nn.Module) -> nn.Module:
    """Put a network in evaluation mode and drop its weight gradients, in place; returns it.

    The gradient with respect to its input stays: the generator learns through it.
    """
    return network.eval().requires_grad_(False)


FOLDED_WITHIN = 1e-3
"""Of the largest logit: rounding is far below, a network whose forward a trace does not catch is far above."""


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
        own = _without_timms_pairs(copy.deepcopy(network))
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
        elif node.op == "call_module" and isinstance(norm := layers[node.target], nn.BatchNorm2d) and norm.running_mean is not None:
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
    """Takes every convolution and pooling as a whole: timm's, which pad as TensorFlow does, look at their input's size."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | nn.AvgPool2d | nn.MaxPool2d) or super().is_leaf_module(m, module_qualified_name)


def _is_ordinary(layer: nn.Conv2d) -> bool:
    """Whether it convolves with its weight as it is, so that a factor on its output is one on the weight."""
    return type(layer) in (nn.Conv2d, CpuConv2d) or type(layer).__name__ == "Conv2dSame"


def folded_and_checked(network: nn.Module, images: Tensor) -> nn.Module:
    """:func:`fold`, and a look at whether the copy answers some images (B, C, H, W) as the network does.

    Both answer in float64: on a GPU, float32 convolutions in TF32 differ by more than a wrong fold may.

    Raises:
        FoldingError: it cannot be folded, the copy answers something else, or the network does not run in float64.
    """
    folded = fold(network)
    with torch.no_grad():
        try:
            expected, answer = (copy.deepcopy(each).double()(images.double()) for each in (network, folded))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
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


def lower_precision(network: nn.Module, dtype: torch.dtype, images: Tensor) -> nn.Module:
    """Cast the weights of a frozen network's convolutions and linear layers, in place; returns it.

    Autocast would cast them at every call. The other layers keep float32, as autocast has it, and so do the layers that its
    logits come out of (:func:`find_heads`), which compute in float32, too.

    Args:
        network: images → logits, with weights in float32.
        dtype: of autocast.
        images: some for it, (B, C, H, W).
    """
    heads = find_heads(network, images)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) and layer not in heads:
            for parameter in layer.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    for head in heads:
        compute_in_float32(head)
    return network


class Observation(NamedTuple):
    """A teacher's answer to a batch, and what was asked for beside it."""

    logits: Tensor
    features: Tensor | None = None
    """What its classifier, the last linear or convolutional layer, is given."""
    statistics: tuple[Tensor, ...] = ()
    """Mean and biased variance of each batch norm's input over the batch, (C,) each: mean, variance, mean, variance, …"""
    running: tuple[Tensor, ...] = ()
    """The running ones of those layers, in the same order."""


class Observer:
    """Calls a teacher and looks at its layers' inputs, with a graph where there is one.

    It calls a copy that shares every parameter and buffer; in the copy, the layers that are looked at keep what they
    see. The teacher itself has no hooks and loses no time. Of a batch norm that was folded, the moments of its input x are
    recovered from the folded convolution's output y = (x − μ)γ/σ + β.

    Args:
        teacher: images → logits, frozen; folded or not.
        statistics: look at what its batch norms are given.
        features: look at what its classifier is given.

    Raises:
        DfkdError: it has no such layer.
    """

    def __init__(self, teacher: nn.Module, *, statistics: bool, features: bool) -> None:
        self.network = teacher
        self._norms: list[Any] = []
        self._folded: list[Any] = []
        self._classifier: Any = None
        if not statistics and not features:
            return
        shared: dict[int, Any] = {id(tensor): tensor for tensor in itertools.chain(teacher.parameters(), teacher.buffers())}
        self.network = copy.deepcopy(teacher, shared)
        if statistics:
            self._folded = [layer for layer in self.network.modules() if hasattr(layer, "folded_norm")]
            inside = {id(layer.folded_norm) for layer in self._folded}
            norms = (layer for layer in self.network.modules() if isinstance(layer, _BatchNorm))
            self._norms = [norm for norm in norms if norm.running_mean is not None and id(norm) not in inside]
            if not self._norms and not self._folded:
                raise DfkdError(f"objective.bn_moments: the teacher {type(teacher).__name__} has no batch norm with running statistics")
        if features:
            layers = [module for module in self.network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
            if not layers:
                raise DfkdError(f"objective.activation: the teacher {type(teacher).__name__} has no linear or convolutional layer")
            self._classifier = layers[-1]
        for layer in self._looked_at():
            layer.__class__ = type(type(layer).__name__, (_KeepsSeen, type(layer)), {})

    def __call__(self, images: Tensor) -> Observation:
        """The teacher's logits for images (B, C, H, W), and what its layers saw meanwhile."""
        for layer in self._looked_at():
            layer.seen = []
        logits = self.network(images)
        statistics: list[Tensor] = []
        running: list[Tensor] = []
        # A layer has seen more than one tensor where the network calls it again.
        for norm in self._norms:
            for x, _ in norm.seen:
                statistics += channel_moments(_as_images(x))
                running += [norm.running_mean, norm.running_var]
        for layer in self._folded:
            for _, y in layer.seen:
                statistics += _before_folding(*channel_moments(y), layer.folded_norm)
                running += [layer.folded_norm.running_mean, layer.folded_norm.running_var]
        features = None if self._classifier is None else self._classifier.seen[-1][0]
        for layer in self._looked_at():
            layer.seen = []
        return Observation(logits, features, tuple(statistics), tuple(running))

    def _looked_at(self) -> Iterator[Any]:
        yield from self._norms
        yield from self._folded
        if self._classifier is not None and self._classifier not in self._folded:
            yield self._classifier


class _KeepsSeen(nn.Module):
    seen: list[tuple[Tensor, Tensor]]

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.seen.append((x, y))
        return y


def _as_images(x: Tensor) -> Tensor:
    """What a one-dimensional batch norm is given, (N, C) or (N, C, L), as (N, C, H, W)."""
    return x if x.ndim == 4 else x.flatten(2).unsqueeze(-1) if x.ndim > 2 else x[..., None, None]


def _before_folding(mean: Tensor, variance: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Moments of what the batch norm would have been given, from those of its output; a channel of gain 0 tells nothing, and passes."""
    assert norm.running_mean is not None and norm.running_var is not None
    gain = torch.ones_like(norm.running_mean) if norm.weight is None else norm.weight
    offset = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
    deviation = (norm.running_var + norm.eps).sqrt()
    # Where the gain is tiny the output is its offset, and what came in is lost in its rounding.
    told = gain.abs() > 1e-3 * gain.abs().amax().clamp(min=1e-12)
    factor = deviation / torch.where(told, gain, torch.ones_like(gain))
    mean = torch.where(told, (mean - offset) * factor + norm.running_mean, norm.running_mean)
    return mean, torch.where(told, variance * factor.square(), norm.running_var)
