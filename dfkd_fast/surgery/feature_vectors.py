"""Vectors of two networks' feature maps that can be compared, computed together with their logits."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dfkd_fast.errors import DfkdError

from .modes import dry_run
from .observe import RecordsCalls
from .outputs import get_logits
from .sharing import sharing_copy

__all__ = ["Call", "FeatureVectors", "matched_layers", "shared_layers"]

SMALLEST_NORM = 1e-6
"""Norm below which inputs are not scaled up: their gradient would be too large."""


class Call(NamedTuple):
    """A call of a layer in a network's forward pass."""

    layer: str
    """Name of the layer."""
    number: int
    """Number of earlier calls of the layer in the same forward pass."""
    channels: int
    """Number of channels of the feature map that the call returns."""


def matched_layers(teacher: nn.Module, student: nn.Module, images: Tensor) -> tuple[list[Call], list[Call]]:
    """Returns the layers whose feature maps are compared, one per spatial size that occurs in both networks, the smallest size last.

    A layer is a module without children. Of those with feature maps (B, C, H, W) of one size, the last is selected: in most
    classifiers the activation before the maps are reduced. Maps of one pixel are ignored.

    Args:
        teacher: Network, images → logits, in the mode in which it is to be called.
        student: Network, images → logits, in the mode in which it is to be called.
        images: Example images (B, C, H, W).

    Returns:
        Calls of the teacher's layers and of the student's, of equal number.

    Raises:
        DfkdError: The networks have no feature maps of the same size.
    """
    of_teacher, of_student = (_last_calls(network, images) for network in (teacher, student))
    sizes = sorted((size for size in of_teacher if size in of_student), key=math.prod, reverse=True)
    if not sizes:
        found = [", ".join(f"{height} x {width}" for height, width in calls) or "no size" for calls in (of_teacher, of_student)]
        maps = f"the teacher has feature maps of {found[0]}, the student of {found[1]}"
        raise DfkdError(f"objective.attention, objective.hint: {maps}; none are equal")
    return [of_teacher[size] for size in sizes], [of_student[size] for size in sizes]


def shared_layers(teacher: nn.Module, student: nn.Module, images: Tensor) -> list[str]:
    """Returns the names of the convolutions and linear layers that both networks call once, with inputs of one shape, in their order.

    Left out are layers whose inputs are of the shape of the images; those that are called with keyword arguments or with an input whose
    first dimension is not the batch; and for speed those with at least twice as many input channels as an earlier layer with inputs of
    the same height and width, such as the wide layers of inverted residuals.

    Args:
        teacher: Network, images → logits, in the mode in which it is to be called.
        student: Network, images → logits, in the mode in which it is to be called.
        images: Example images (B, C, H, W).

    Raises:
        DfkdError: The networks share no layer.
    """
    of_teacher, of_student = (_inputs(network, images) for network in (teacher, student))
    names: list[str] = []
    smallest: dict[torch.Size, float] = {}
    for name, shape in of_student.items():
        if shape is None or shape != of_teacher.get(name):
            continue
        is_linear = isinstance(student.get_submodule(name), nn.Linear)
        channels, positions = (shape[-1], shape[1:-1]) if is_linear else (shape[1], shape[2:])
        if channels < 2 * smallest.get(positions, math.inf):
            names.append(name)
            smallest[positions] = min(channels, smallest.get(positions, math.inf))
    if not names:
        raise DfkdError(
            "objective.features: teacher and student have no convolution or linear layer of the same name and input size in common;"
            " the term is for students that are copies of the teacher; set it to 0"
        )
    return names


class FeatureVectors(nn.Module):
    """Module that returns a network's logits together with a vector of its feature maps per image, which is differentiable.

    The squared distance of a student's vector and its teacher's is the weighted sum of three terms:

    - attention transfer (Zagoruyko and Komodakis 2017, arXiv 1612.03928), in the form of the public code of ZSKT (arXiv 1905.09768):
      the attention map of a layer's features f is q = Σ_c f_c² over the channels, divided by ‖q‖₂; the term is the sum over layers of
      the mean squared difference over positions;
    - the hint of FitNets (Romero et al. 2015, arXiv 1412.6550): the mean squared difference over channels and positions of the last
      call's features, after a projection of the student's to the teacher's channels;
    - the mean over ``layers`` of ‖x/‖x‖₂ − y/‖y‖₂‖₂², where x and y are the layer's inputs in student and teacher (ours). The norms make
      the layers equally important, whatever the size of their inputs.

    It calls a copy of the network that shares every parameter and buffer; the network itself is not changed. Its parameters are those of
    the network and of the projection.

    Args:
        network: Network, images → logits, in the mode in which it is to be called.
        calls: Calls of layers that return feature maps (B, C, H, W).
        attention: Weight of attention transfer; 0 omits it.
        hint: Weight of the hint; 0 omits it.
        projection: Maps a student's features of the last call to the teacher's channels, for the hint; None for a teacher.
        layers: Names of the layers whose inputs are compared.
        features: Weight of the term that compares them.
    """

    def __init__(
        self,
        network: nn.Module,
        calls: Sequence[Call] = (),
        attention: float = 0.0,
        hint: float = 0.0,
        projection: nn.Module | None = None,
        *,
        layers: Sequence[str] = (),
        features: float = 0.0,
    ) -> None:
        super().__init__()
        self.network = sharing_copy(network)
        self.attention, self.hint, self.projection, self.features = attention, hint, projection, features
        self._calls, self._compared = calls, layers
        names = dict.fromkeys([*(call.layer for call in calls), *layers])
        self._layers: dict[str, Any] = {name: self.network.get_submodule(name) for name in names}
        for layer in self._layers.values():
            layer.__class__ = type(type(layer).__name__, (RecordsCalls, type(layer)), {})

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the logits and the vectors (B, D), in float32, of images (B, C, H, W)."""
        for layer in self._layers.values():
            layer.calls = []
        logits = get_logits(self.network(images))
        features = [self._recorded(call.layer, call.number)[1] for call in self._calls]
        inputs = [self._recorded(name, 0)[0] for name in self._compared]
        for layer in self._layers.values():
            layer.calls = []
        vectors = [_scaled(_attention_map(each), self.attention) for each in features] if self.attention else []
        if self.hint:
            last = features[-1] if self.projection is None else self.projection(features[-1])
            vectors.append(_scaled(last.float().flatten(1), self.hint))
        vectors += [_of_norm((self.features / len(inputs)) ** 0.5, each) for each in inputs]
        return logits, torch.cat(vectors, dim=1)

    def _recorded(self, layer: str, number: int) -> tuple[Tensor, Tensor]:
        """Returns input and output of a call of a layer in this forward pass."""
        calls: list[tuple[Tensor, Tensor]] = self._layers[layer].calls
        if number >= len(calls):
            raise DfkdError(
                f"objective.attention, hint and features: layer {layer!r} was called {len(calls)} times, and {number + 1} times "
                "before: networks that skip layers at random are not supported"
            )
        return calls[number]


def _attention_map(features: Tensor) -> Tensor:
    return nn.functional.normalize(features.float().square().sum(1).flatten(1), dim=1)


def _of_norm(norm: float, inputs: Tensor) -> Tensor:
    """Returns inputs (B, C, ...) as vectors (B, D) of a norm, channels last, as they are in memory."""
    vectors = inputs.float().movedim(1, -1).flatten(1)
    return vectors * (norm / torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp(min=SMALLEST_NORM))


def _scaled(vectors: Tensor, weight: float) -> Tensor:
    """Returns vectors whose squared distances are ``weight`` times the mean squared differences of the elements."""
    return vectors * (weight / vectors.shape[1]) ** 0.5


def _last_calls(network: nn.Module, images: Tensor) -> dict[tuple[int, int], Call]:
    """Returns the last call of a layer that returns feature maps of each spatial size."""
    last: dict[tuple[int, int], Call] = {}
    counts: Counter[str] = Counter()
    with dry_run(network) as trial:
        # Modules of a parametrization return weights.
        names = {layer: name for name, layer in trial.named_modules() if "parametrizations" not in name.split(".")}

        def record(layer: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            # RecordsCalls, which records the output in training, supports one input.
            if len(inputs) == 1 and isinstance(output, Tensor) and output.ndim == 4 and output.shape[2:].numel() > 1:
                last[output.shape[2], output.shape[3]] = Call(names[layer], counts[names[layer]], output.shape[1])
            counts[names[layer]] += 1

        for layer in names:
            children = [name for name, _ in layer.named_children() if name != "parametrizations"]
            if not children and not isinstance(layer, torch.jit.ScriptModule):
                layer.register_forward_hook(record)
        trial(images)
    return last


def _inputs(network: nn.Module, images: Tensor) -> dict[str, torch.Size | None]:
    """Returns the shape of the input of each convolution and linear layer, in the order of the first calls; None if it is not compared."""
    shapes: dict[str, torch.Size | None] = {}
    with dry_run(network) as trial:
        # PyTorch's fast path does not call these layers.
        hidden = {id(layer) for block in trial.modules() if isinstance(block, nn.TransformerEncoderLayer) for layer in block.modules()}
        names: dict[nn.Module, str] = {
            layer: name for name, layer in trial.named_modules() if isinstance(layer, nn.Linear | _ConvNd) and id(layer) not in hidden
        }

        def record(layer: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            shape = inputs[0].shape if len(inputs) == 1 and not keywords else images.shape
            is_batch = len(shape) > 1 and shape[0] == len(images) and shape != images.shape
            shapes[names[layer]] = shape if is_batch and names[layer] not in shapes else None

        for layer in names:
            layer.register_forward_pre_hook(record, with_kwargs=True)
        trial(images.clone())  # the network may modify its input in place
    return shapes
