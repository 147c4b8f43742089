"""Where a network's logits are in what it returns."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from dfkd_fast.errors import DfkdError

from .modes import dry_run, eval_mode

__all__ = ["auxiliary_outputs", "get_logits", "logits_only"]

LOGITS_KEYS = ("out", "logits")
"""Of a dict: torchvision's segmenters return the one, transformers' models the other."""


def get_logits(output: Any) -> Tensor:
    """The logits in a network's output.

    Args:
        output: a tensor; a dict with one under ``out`` or ``logits``; an object, such as a named tuple, with an attribute ``logits``;
            or a tuple or list, whose first tensor is taken.

    Raises:
        DfkdError: it is none of these.
    """
    leaf: Any = Tensor | fx.Proxy  # a proxy while a network is traced, which claims to have any attribute
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


def auxiliary_outputs(network: nn.Module, images: Tensor) -> str | None:
    """What a network returns beside its logits in the mode it is in, for a user to be told; None if nothing.

    Args:
        network: images → logits, in any form that :func:`get_logits` takes; nothing of it changes.
        images: some for it, (B, C, H, W), on its device; at least two in training mode, as batch norms need them.

    Returns:
        A predicate to put behind the network's role: "returns … in training mode: …".

    Raises:
        DfkdError: it returns no logits.
    """
    with dry_run(network) as trial, torch.no_grad():
        output = trial(images.clone())  # which a network may change in place
    logits = get_logits(output)
    parts = {name: part for name, part in _parts(output).items() if any(isinstance(leaf, Tensor) for leaf in tree_leaves(part))}
    others = [name for name, part in parts.items() if part is not logits]
    if not others:
        return None
    used = next((name for name, part in parts.items() if part is logits), "logits")
    mode = "training" if network.training else "evaluation"
    untrained = "; layers that only these depend on are not trained" if network.training else ""
    return f"returns {type(output).__name__} in {mode} mode: {used} is used as logits, not {', '.join(others)}{untrained}"


def _parts(output: Any) -> dict[str, Any]:
    """The parts of a network's output, by what a user may call them."""
    if isinstance(output, Tensor):
        return {}
    if isinstance(output, Mapping):
        return {repr(key): part for key, part in output.items()}
    if isinstance(output, tuple | list):
        names = getattr(output, "_fields", [f"element {number}" for number in range(len(output))])
        return dict(zip(names, output, strict=True))
    return dict(getattr(output, "__dict__", {}))


def logits_only(network: nn.Module, images: Tensor) -> nn.Module:
    """The network itself where it returns a tensor for images and leaves them alone, else one that shares its parameters and does.

    Networks with auxiliary classifiers often return a tensor in evaluation mode only, so a network in training mode is looked at
    in both modes. Nothing of it changes. One that writes in its input is given a copy: others are to see the same images.

    Args:
        network: images → logits, in any form that :func:`get_logits` takes.
        images: some for it, (B, C, H, W), on its device; at least two in training mode, as batch norms need them.
    """
    given = [images.clone(), images.clone()]
    with eval_mode(network):
        outputs = [network(given[0])]
    if network.training:
        with dry_run(network) as trial, torch.no_grad():
            outputs.append(trial(given[1]))
    writes = not all(torch.equal(each, images) for each in given)
    return _LogitsOnly(network, writes) if writes or not all(isinstance(output, Tensor) for output in outputs) else network


class _LogitsOnly(nn.Module):
    def __init__(self, network: nn.Module, writes: bool) -> None:
        super().__init__()
        self.network, self.writes = network, writes
        self.training = network.training

    def forward(self, images: Tensor) -> Tensor:
        return get_logits(self.network(images.clone() if self.writes else images))
