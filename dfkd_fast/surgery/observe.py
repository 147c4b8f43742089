"""What a frozen teacher's layers are given, beside its logits."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast.errors import DfkdError
from dfkd_fast.kernels import channel_moments

from .fold import has_running_statistics
from .modes import deep_copy
from .outputs import get_logits

__all__ = ["Observation", "Observer"]


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
        self.network = deep_copy(teacher, shared)
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
        logits = get_logits(self.network(images))
        # A layer has seen more than one tensor where the network calls it again.
        given = [(norm, _as_images(x)) for norm in self._norms for x, _ in norm.seen]
        given += [(layer, y) for layer in self._folded for _, y in layer.seen]
        if self._classifier is not None and not self._classifier.seen:
            raise DfkdError(f"objective.activation: the teacher {type(self.network).__name__} does not call its last layer as a module")
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
