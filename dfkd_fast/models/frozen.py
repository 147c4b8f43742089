"""The frozen teacher: it owes no gradient and never changes, its batch norms are folded, and what its layers see can be asked for."""

import copy
import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops import FrozenBatchNorm2d

from dfkd_fast.errors import DfkdError, first_line
from dfkd_fast.kernels import channel_moments

from .convolution import CpuConv2d
from .heads import compute_in_float32, find_heads
from .modes import logits_of

__all__ = [
    "FoldingError",
    "Observation",
    "Observer",
    "fold",
    "folded_and_checked",
    "freeze",
    "has_running_statistics",
    "lower_precision",
]


def freeze(network: nn.Module) -> nn.Module:
    """Put a network in evaluation mode and drop its weight gradients, in place; returns it.

    The gradient with respect to its input stays: the generator learns through it.
    """
    for parameter in network.eval().parameters():  # of a script, too, which has no requires_grad_
        parameter.requires_grad_(False)
    return network


def has_running_statistics(layer: nn.Module) -> bool:
    """Whether a layer is a batch norm that keeps running statistics: PyTorch's, a frozen one of torchvision or timm, or a user's own.

    Instance norms keep them as well, but of every image alone.
    """
    if isinstance(layer, _InstanceNorm | torch.jit.ScriptModule):  # a compiled layer cannot be looked into
        return False
    return all(isinstance(getattr(layer, name, None), Tensor) for name in ("running_mean", "running_var"))


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
        elif (
            node.op == "call_module"
            and isinstance(norm := layers[node.target], nn.BatchNorm2d | FrozenBatchNorm2d)
            and has_running_statistics(norm)
        ):
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
        whole = isinstance(m, nn.Conv2d | nn.AvgPool2d | nn.MaxPool2d | FrozenBatchNorm2d)
        return whole or super().is_leaf_module(m, module_qualified_name)


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
    statistics: Tensor | None = None
    """Means and biased variances of the batch norms' inputs over the batch, (2, calls, C): a row for each call of a batch norm,
    padded with zeros to the channels of the widest."""
    running: Tensor | None = None
    """Their running means and variances, likewise."""


class Observer:
    """Calls a teacher and looks at its layers' inputs, with a graph where there is one.

    It calls a copy that shares every parameter and buffer; in the copy, the layers that are looked at keep what they
    see. The teacher itself has no hooks and loses no time. Of a batch norm that was folded, the moments of its input x are
    recovered from the folded convolution's output y = (x − μ)γ/σ + β. Whatever of that does not depend on the batch is computed
    once, at the first call.

    Args:
        teacher: images → logits, frozen; folded or not.
        statistics: look at what its batch norms are given.
        features: look at what its classifier is given.

    Raises:
        DfkdError: it has no such layer, or calls none.
    """

    def __init__(self, teacher: nn.Module, *, statistics: bool, features: bool) -> None:
        self.network = teacher
        self._norms: list[Any] = []
        self._folded: list[Any] = []
        self._classifier: Any = None
        self._constants: dict[tuple[nn.Module, ...], _Constants] = {}
        if not statistics and not features:
            return
        shared: dict[int, Any] = {id(tensor): tensor for tensor in itertools.chain(teacher.parameters(), teacher.buffers())}
        self.network = copy.deepcopy(teacher, shared)
        if statistics:
            self._folded = [layer for layer in self.network.modules() if hasattr(layer, "folded_norm")]
            inside = {id(layer.folded_norm) for layer in self._folded}
            self._norms = [layer for layer in self.network.modules() if has_running_statistics(layer) and id(layer) not in inside]
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
        logits = logits_of(self.network(images))
        # A layer has seen more than one tensor where the network calls it again.
        given = [(norm, _as_images(x)) for norm in self._norms for x, _ in norm.seen]
        given += [(layer, y) for layer in self._folded for _, y in layer.seen]
        features = None if self._classifier is None else self._classifier.seen[-1][0]
        for layer in self._looked_at():
            layer.seen = []
        return Observation(logits, features, *(self._statistics(given) if self._norms or self._folded else ()))

    def _looked_at(self) -> Iterator[Any]:
        yield from self._norms
        yield from self._folded
        if self._classifier is not None and self._classifier not in self._folded:
            yield self._classifier

    def _statistics(self, given: list[tuple[nn.Module, Tensor]]) -> tuple[Tensor, Tensor]:
        """Of what was seen, call by call, as in :class:`Observation`; with few operations, however many layers there are."""
        if not given:
            raise DfkdError(f"objective.bn_moments: the teacher {type(self.network).__name__} calls none of its batch norms")
        layers = tuple(layer for layer, _ in given)
        moments = [channel_moments(x) for _, x in given]
        if layers not in self._constants:
            self._constants[layers] = _constants(layers, moments[0][0])
        scale, shift, running, paddings = self._constants[layers]
        parts = [part for each in zip(*moments, strict=True) for pair in zip(each, paddings, strict=True) for part in pair if len(part)]
        return torch.addcmul(shift, torch.cat(parts).view_as(scale), scale), running


class _KeepsSeen(nn.Module):
    seen: list[tuple[Tensor, Tensor]]

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.seen.append((x, y))
        return y


def _as_images(x: Tensor) -> Tensor:
    """What a one-dimensional batch norm is given, (N, C) or (N, C, L), as (N, C, H, W)."""
    return x if x.ndim == 4 else x.flatten(2).unsqueeze(-1) if x.ndim > 2 else x[..., None, None]


class _Constants(NamedTuple):
    """What leads from the moments of what was seen to those of the batch norms' inputs: moments · scale + shift; (2, calls, C) each."""

    scale: Tensor
    shift: Tensor
    running: Tensor
    paddings: list[Tensor]
    """Zeros behind the channels of each call."""


@torch.no_grad()
def _constants(layers: Sequence[nn.Module], like: Tensor) -> _Constants:
    each = [[tensor.to(like.dtype) for tensor in _before_folding(layer)] for layer in layers]
    channels = [running.shape[1] for _, _, running in each]
    paddings = [like.new_zeros(max(channels) - count) for count in channels]
    padded = [[F.pad(tensor, (0, len(padding))) for tensor in tensors] for tensors, padding in zip(each, paddings, strict=True)]
    scale, shift, running = (torch.stack(tensors, dim=1) for tensors in zip(*padded, strict=True))
    return _Constants(scale, shift, running, paddings)


def _before_folding(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and shift from the moments of what was seen of a layer to those of its batch norm's input, and the running ones: (2, C)."""
    norm = getattr(layer, "folded_norm", layer)
    running = torch.stack([norm.running_mean, norm.running_var])
    if norm is layer:
        return torch.ones_like(running), torch.zeros_like(running), running
    gain = torch.ones_like(norm.running_mean) if norm.weight is None else norm.weight
    offset = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
    deviation = (norm.running_var + norm.eps).sqrt()
    # Where the gain is tiny the output is its offset, and what came in is lost in its rounding: there stand the running ones.
    told = gain.abs() > 1e-3 * gain.abs().amax().clamp(min=1e-12)
    factor = torch.where(told, deviation / gain, 0.0)
    shift = torch.stack([norm.running_mean - offset * factor, torch.where(told, 0.0, norm.running_var)])
    return torch.stack([factor, factor.square()]), shift, running
