"""Records a frozen teacher's batch statistics and features together with its logits."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast.errors import DfkdError
from dfkd_fast.kernels import PartialMoments, combine_moments, partial_moments

from .fold import has_running_statistics
from .fuse_conv_act import ConvAct2d
from .modes import deep_copy
from .outputs import get_logits

__all__ = ["Observation", "Observer", "RecordsCalls"]


class Observation(NamedTuple):
    """A teacher's logits for a batch, with the requested statistics and features."""

    logits: Tensor
    features: Tensor | None = None
    """Input of the classifier, the last linear or convolutional layer."""
    statistics: Tensor | None = None
    """Means and biased variances of the batch norms' inputs over the batch, (2, calls, C), with one row per call of a batch norm,
    zero-padded to the largest number of channels."""
    running: Tensor | None = None
    """Running means and variances of the batch norms, in the same layout."""


class Observer:
    """Callable that returns a teacher's logits together with its batch statistics and features, which are differentiable.

    It calls a copy of the teacher that shares every parameter and buffer and records the inputs and outputs of layers; the teacher
    itself has no hooks. The moments of the input x of a folded batch norm are recovered from the folded convolution's output
    y = (x − μ)γ/σ + β. Constants that do not depend on the batch are computed once, in the first call.

    Args:
        teacher: frozen network, images → logits; folded or not.
        statistics: compute the means and variances of the batch norms' inputs.
        features: return the classifier's input.

    Raises:
        DfkdError: the teacher has no batch norm with running statistics, or no linear or convolutional layer.
    """

    def __init__(self, teacher: nn.Module, *, statistics: bool, features: bool) -> None:
        self.network = teacher
        self._norms: list[Any] = []
        self._folded: list[Any] = []
        self._fused: list[Any] = []
        self._classifier: Any = None
        self._constants: dict[tuple[nn.Module, ...], _Constants] = {}
        self.running: Tensor | None = None
        """``running`` of the last :class:`Observation`; None before the first one, or without statistics."""
        if not statistics and not features:
            return
        shared: dict[int, Any] = {id(tensor): tensor for tensor in itertools.chain(teacher.parameters(), teacher.buffers())}
        self.network = deep_copy(teacher, shared)
        if statistics:
            folded = [layer for layer in self.network.modules() if hasattr(layer, "folded_norm")]
            self._fused = [layer for layer in folded if isinstance(layer, ConvAct2d)]
            self._folded = [layer for layer in folded if not isinstance(layer, ConvAct2d)]
            folded_norms = {id(layer.folded_norm) for layer in folded}
            self._norms = [layer for layer in self.network.modules() if has_running_statistics(layer) and id(layer) not in folded_norms]
            if not self._norms and not folded:
                raise DfkdError(f"objective.bn_moments: the teacher {type(teacher).__name__} has no batch norm with running statistics")
        if features:
            layers = [module for module in self.network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
            if not layers:
                raise DfkdError(f"objective.activation: the teacher {type(teacher).__name__} has no linear or convolutional layer")
            self._classifier = layers[-1]
        for layer in self._recording_layers():
            layer.__class__ = type(type(layer).__name__, (RecordsCalls, type(layer)), {})

    def __call__(self, images: Tensor) -> Observation:
        """Returns the teacher's logits for images (B, C, H, W), with the requested statistics and features.

        Raises:
            DfkdError: the teacher's forward pass calls none of its batch norms, or not its last layer.
        """
        for layer in self._recording_layers():
            layer.calls = []
        for layer in self._fused:
            layer.moments = []
        logits = get_logits(self.network(images))
        # A layer has several calls if the network calls it repeatedly.
        moments = [(norm, partial_moments(_as_images(x))) for norm in self._norms for x, _ in norm.calls]
        moments += [(layer, partial_moments(y)) for layer in self._folded for _, y in layer.calls]
        moments += [(layer, each) for layer in self._fused for each in layer.moments]
        if self._classifier is not None and not self._classifier.calls:
            raise DfkdError(f"objective.activation: the teacher {type(self.network).__name__} does not call its last layer as a module")
        features = None if self._classifier is None else self._classifier.calls[-1][0]
        for layer in self._recording_layers():
            layer.calls = []
        for layer in self._fused:
            layer.moments = []
        return Observation(logits, features, *(self._statistics(moments) if self._norms or self._folded or self._fused else ()))

    def _recording_layers(self) -> Iterator[Any]:
        yield from self._norms
        yield from self._folded
        if self._classifier is not None and self._classifier not in self._folded:
            yield self._classifier

    def _statistics(self, recorded: list[tuple[nn.Module, PartialMoments]]) -> tuple[Tensor, Tensor]:
        """Returns ``statistics`` and ``running`` of :class:`Observation`.

        Args:
            recorded: for every call, the layer and the partial moments of a batch norm's input or of a folded convolution's output.
        """
        if not recorded:
            raise DfkdError(f"objective.bn_moments: the teacher {type(self.network).__name__} calls none of its batch norms")
        layers = tuple(layer for layer, _ in recorded)
        moments = [each for _, each in recorded]
        if layers not in self._constants:
            self._constants[layers] = _constants(layers, moments[0].center)
        scale, shift, self.running = self._constants[layers]
        return combine_moments(moments, scale, shift), self.running


class RecordsCalls(nn.Module):
    """Mixin that records the input and output of every call."""

    calls: list[tuple[Tensor, Tensor]]

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        y = super().forward(x, *others)
        self.calls.append((x, y))
        return y


def _as_images(x: Tensor) -> Tensor:
    """Returns the input of a batch norm, (N, C), (N, C, L) or (N, C, H, W), as (N, C, H, W)."""
    return x if x.ndim == 4 else x.flatten(2).unsqueeze(-1) if x.ndim > 2 else x[..., None, None]


class _Constants(NamedTuple):
    """Affine map from the moments of the recorded tensors to those of the batch norms' inputs: moments · scale + shift.

    All tensors are (2, calls, C).
    """

    scale: Tensor
    shift: Tensor
    running: Tensor


@torch.no_grad()
def _constants(layers: Sequence[nn.Module], like: Tensor) -> _Constants:
    each = [[tensor.to(like.dtype) for tensor in _input_moments_map(layer)] for layer in layers]
    width = max(running.shape[1] for _, _, running in each)
    padded = [[F.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors] for tensors in each]
    return _Constants(*(torch.stack(tensors, dim=1) for tensors in zip(*padded, strict=True)))


def _input_moments_map(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns scale and shift of :class:`_Constants` for one layer, and its running mean and variance, (2, C) each."""
    norm = getattr(layer, "folded_norm", layer)
    running = torch.stack([norm.running_mean, norm.running_var])
    if norm is layer:
        return torch.ones_like(running), torch.zeros_like(running), running
    gain = torch.ones_like(norm.running_mean) if norm.weight is None else norm.weight
    offset = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
    deviation = (norm.running_var + norm.eps).sqrt()
    # Where the gain is tiny, rounding hides the input in the output; the running statistics are used instead.
    recoverable = gain.abs() > 1e-3 * gain.abs().amax().clamp(min=1e-12)
    factor = torch.where(recoverable, deviation / gain, 0.0)
    offset = offset + getattr(layer, "mean_shift", 0.0)
    shift = torch.stack([norm.running_mean - offset * factor, torch.where(recoverable, 0.0, norm.running_var)])
    return torch.stack([factor, factor.square()]), shift, running
