"""Extraction of logits from the outputs of networks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from dfkd_fast.errors import DfkdError

from .modes import dry_run, eval_mode

__all__ = ["extract_logits", "get_logits", "logits_only"]

EVALUATED = 2
"""Largest batch size of a pass in evaluation mode, where images do not affect each other."""
LOGITS_KEYS = ("out", "logits")
"""Keys of the logits in a dict: torchvision's segmentation networks use the first, transformers' models the second."""


def get_logits(output: Any) -> Tensor:
    """Returns the logits in a network's output.

    Args:
        output: a tensor; a dict with a tensor under ``out`` or ``logits``; an object, such as a named tuple, with an attribute
            ``logits``; or a tuple or list, of which the first tensor is returned.

    Raises:
        DfkdError: the output has no logits in one of these forms.
    """
    leaf: Any = Tensor | fx.Proxy  # outputs are proxies during torch.fx tracing; hasattr is True for every attribute of a proxy
    logits = output
    if isinstance(output, Mapping):
        logits = next((output[key] for key in LOGITS_KEYS if key in output), None)
    elif not isinstance(output, leaf) and hasattr(output, "logits"):
        logits = output.logits
    elif isinstance(output, tuple | list):
        logits = next((element for element in output if isinstance(element, leaf)), None)
    if not isinstance(logits, leaf):
        keys = f" with the keys {', '.join(map(repr, output)) or 'of nothing'}" if isinstance(output, Mapping) else ""
        raise DfkdError(
            "must return logits: a tensor, a tuple or list with one, or a dict or an object with one under 'out' or 'logits', "
            f"not {type(output).__name__}{keys}"
        )
    return logits


def extract_logits(network: nn.Module, images: Tensor) -> tuple[nn.Module, str | None]:
    """Returns a module that shares a network's parameters and returns only its logits, and a description of its other outputs.

    The module is the network itself if it returns a tensor and does not modify its input. Otherwise it is a wrapper that extracts the
    logits and, if needed, clones the input. Since networks with auxiliary classifiers often return a tensor in evaluation mode only,
    a network in training mode is tried in both modes.

    Args:
        network: images → logits, in any form that :func:`get_logits` accepts; unchanged.
        images: example images (B, C, H, W) on the network's device; at least two in training mode, for batch norms.

    Returns:
        The module; and the end of a sentence about the network in its current mode for a log line, "returns … in training mode: …",
        or None if there are no other outputs.

    Raises:
        DfkdError: the output in the current mode has no logits.
    """
    inputs = [images[:EVALUATED].clone(), images.clone()]  # cloned, since the network may modify its input in place
    with eval_mode(network):
        outputs = [network(inputs[0])]
    if network.training:
        with dry_run(network) as trial, torch.no_grad():
            outputs.append(trial(inputs[1]))
    description = _describe_auxiliary(outputs[-1], "training" if network.training else "evaluation")
    modifies_input = not all(torch.equal(each, images[: len(each)]) for each in inputs)
    if not modifies_input and all(isinstance(output, Tensor) for output in outputs):
        return network, description
    return _LogitsOnly(network, modifies_input), description


def logits_only(network: nn.Module, images: Tensor) -> nn.Module:
    """Returns the module of :func:`extract_logits`."""
    return extract_logits(network, images)[0]


def _describe_auxiliary(output: Any, mode: str) -> str | None:
    logits = get_logits(output)
    parts = {name: part for name, part in _parts(output).items() if any(isinstance(leaf, Tensor) for leaf in tree_leaves(part))}
    auxiliary = [name for name, part in parts.items() if part is not logits]
    if not auxiliary:
        return None
    used = next((name for name, part in parts.items() if part is logits), "logits")
    untrained = "; layers used only for these are not trained" if mode == "training" else ""
    return f"returns {type(output).__name__} in {mode} mode: {used} is used as logits, not {', '.join(auxiliary)}{untrained}"


def _parts(output: Any) -> dict[str, Any]:
    """Returns the parts of a network's output by a name for messages: key, field, attribute or position."""
    if isinstance(output, Tensor):
        return {}
    if isinstance(output, Mapping):
        return {repr(key): part for key, part in output.items()}
    if isinstance(output, tuple | list):
        names = getattr(output, "_fields", [f"element {number}" for number in range(len(output))])
        return dict(zip(names, output, strict=True))
    return dict(getattr(output, "__dict__", {}))


class _LogitsOnly(nn.Module):
    def __init__(self, network: nn.Module, clone_input: bool) -> None:
        super().__init__()
        self.network, self.clone_input = network, clone_input
        self.training = network.training

    def forward(self, images: Tensor) -> Tensor:
        return get_logits(self.network(images.clone() if self.clone_input else images))
