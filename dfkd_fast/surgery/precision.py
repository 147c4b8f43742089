"""Layers in another precision than autocast gives them: a frozen network's weights are cast once, logits and spectral norms stay float32.

Rounded to bfloat16, logits near 10 are multiples of 1/16, and the difference between a teacher and a student who nearly agree is noise.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils._pytree import tree_map_only

from .modes import eval_mode
from .outputs import get_logits

__all__ = ["SpectralNorm", "compute_in_float32", "find_heads", "in_float32", "keep_spectral_norms_in_float32", "lower_precision"]


def find_heads(network: nn.Module, images: Tensor) -> list[nn.Module]:
    """The layers with a weight matrix whose outputs reach the logits through no other such layer.

    That is a classifier's last linear layer, a segmenter's last convolution before the upsampling, and several layers where
    their outputs are added up, as LR-ASPP's are. The order in which layers are called decides, not that in which they are
    registered: an auxiliary classifier is not among them.

    Args:
        network: images → logits, in any form that ``get_logits`` takes; its mode and its buffers are left as they are.
        images: (B, C, H, W), on its device; only the shape matters.
    """
    layers: dict[Node, nn.Module] = {}

    def record(layer: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            layers.setdefault(output.grad_fn, layer)

    hooks = [layer.register_forward_hook(record) for layer in network.modules() if _has_matrix(layer)]
    try:
        with eval_mode(network), torch.enable_grad():
            # Cloned, since a network may change its input in place, which a leaf of the graph forbids.
            logits = get_logits(network(images.detach().requires_grad_().clone()))
    finally:
        for hook in hooks:
            hook.remove()
    heads: dict[nn.Module, None] = {}
    pending, visited = [logits.grad_fn], set[Node]()
    while pending:
        node = pending.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if node in layers:
            heads[layers[node]] = None
        else:
            pending += [before for before, _ in node.next_functions]
    return list(heads)


def compute_in_float32(layer: nn.Module) -> None:
    """Let a layer compute in float32 under autocast from now on; its parameters and its state keep their names."""
    layer.__class__ = _in_float32(type(layer))  # type: ignore[arg-type]  # mypy asks the class for its instances' hash


@contextmanager
def in_float32(layers: Iterable[nn.Module]) -> Iterator[None]:
    """The same while the context lasts, for layers that are a user's and must not be changed for good."""
    classes = [(layer, type(layer)) for layer in layers]
    for layer, _ in classes:
        compute_in_float32(layer)
    try:
        yield
    finally:
        for layer, before in reversed(classes):
            layer.__class__ = before


def lower_precision(network: nn.Module, dtype: torch.dtype, images: Tensor) -> nn.Module:
    """Cast the weights of a frozen network's convolutions and linear layers, in place; returns it.

    Autocast would cast them at every call. The other layers keep float32, as autocast has it, and so do the layers that its
    logits come out of (:func:`find_heads`), which compute in float32, too.

    Args:
        network: images → logits, with weights in float32.
        dtype: of autocast.
        images: some for it, (B, C, H, W).
    """
    heads = find_heads(network, images)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) and layer not in heads:
            for parameter in layer.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    for head in heads:
        compute_in_float32(head)
    return network


class SpectralNorm(_SpectralNorm):
    """PyTorch's parametrization of a weight, in float32 under autocast, which would round its power iteration at every product."""

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return super().forward(weight)


def keep_spectral_norms_in_float32(network: nn.Module) -> nn.Module:
    """Make every ``torch.nn.utils.parametrizations.spectral_norm`` of a network a :class:`SpectralNorm`, in place; returns the network."""
    for norm in network.modules():
        if type(norm) is _SpectralNorm:
            norm.__class__ = SpectralNorm
    return network


class _Float32(nn.Module):
    def forward(self, *arguments: Any, **named: Any) -> Any:
        arguments, named = tree_map_only(Tensor, _widened, (arguments, named))
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            return super().forward(*arguments, **named)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


@cache  # a compiled network checks the classes of its layers: a new one at every call would compile it anew
def _in_float32(layer: type[nn.Module]) -> type[nn.Module]:
    return layer if issubclass(layer, _Float32) else type(layer.__name__, (_Float32, layer), {})


def _has_matrix(layer: nn.Module) -> bool:
    if isinstance(layer, torch.jit.ScriptModule):  # compiled with the precision that it has: no hook sees it, no class changes it
        return False
    if isinstance(layer, nn.Linear | _ConvNd):
        return True
    # A user's own layer. A module with others inside is no layer: a transformer has its position embedding beside them.
    return not any(True for _ in layer.children()) and any(parameter.ndim > 1 for parameter in layer.parameters(recurse=False))
