"""The frozen teacher: it owes no gradient and never changes, but what its layers see can be asked for."""

import copy
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd_fast.errors import DfkdError
from dfkd_fast.kernels import channel_moments

__all__ = ["Observation", "Observer", "freeze"]


def freeze(network: nn.Module) -> nn.Module:
    """Put a network in evaluation mode and drop its weight gradients, in place; returns it.

    The gradient with respect to its input stays: the generator learns through it.
    """
    return network.eval().requires_grad_(False)


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

    It calls a copy that shares every parameter and buffer; in the copy, the layers that are looked at keep their
    input. The teacher itself has no hooks and loses no time.

    Args:
        teacher: images → logits, frozen.
        statistics: look at what its batch norms are given.
        features: look at what its classifier is given.

    Raises:
        DfkdError: it has no such layer.
    """

    def __init__(self, teacher: nn.Module, *, statistics: bool, features: bool) -> None:
        self.network = teacher
        self._norms: list[Any] = []
        self._classifier: Any = None
        if not statistics and not features:
            return
        shared: dict[int, Any] = {id(tensor): tensor for tensor in itertools.chain(teacher.parameters(), teacher.buffers())}
        self.network = copy.deepcopy(teacher, shared)
        if statistics:
            self._norms = [m for m in self.network.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
            if not self._norms:
                raise DfkdError(f"objective.bn_moments: the teacher {type(teacher).__name__} has no batch norm with running statistics")
        if features:
            layers = [module for module in self.network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
            if not layers:
                raise DfkdError(f"objective.activation: the teacher {type(teacher).__name__} has no linear or convolutional layer")
            self._classifier = layers[-1]
        for layer in self._looked_at():
            layer.__class__ = type(type(layer).__name__, (_KeepsInput, type(layer)), {})

    def __call__(self, images: Tensor) -> Observation:
        """The teacher's logits for images (B, C, H, W), and what its layers were given meanwhile."""
        for layer in self._looked_at():
            layer.inputs = []
        logits = self.network(images)
        statistics: list[Tensor] = []
        running: list[Tensor] = []
        for norm in self._norms:
            for x in norm.inputs:  # more than one where the network calls a layer again
                statistics += channel_moments(x if x.ndim == 4 else x.flatten(2).unsqueeze(-1) if x.ndim > 2 else x[..., None, None])
                running += [norm.running_mean, norm.running_var]
        features = None if self._classifier is None else self._classifier.inputs[-1]
        for layer in self._looked_at():
            layer.inputs = []
        return Observation(logits, features, tuple(statistics), tuple(running))

    def _looked_at(self) -> Iterator[Any]:
        yield from self._norms
        if self._classifier is not None:
            yield self._classifier


class _KeepsInput(nn.Module):
    inputs: list[Tensor]

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x)
        return super().forward(x)
