"""Exceptions from autocast: weights of frozen networks are cast once, logits and spectral norms are computed in float32.

In bfloat16, logits near 10 are multiples of 1/16, so that small differences between a teacher and a student would be noise.
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

__all__ = [
    "Float32Layer",
    "SpectralNorm",
    "compute_in_float32",
    "find_heads",
    "in_float32",
    "keep_spectral_norms_in_float32",
    "lower_precision",
]


def find_heads(network: nn.Module, images: Tensor) -> list[nn.Module]:
    """Returns the layers with a weight matrix whose outputs reach the logits without passing through another such layer.

    For a classifier, this is the last linear layer; for a segmentation network, the last convolution before the upsampling; and
    several layers if their outputs are summed, as in LR-ASPP. The layers are found in the autograd graph of a forward pass, so the
    order of registration does not matter, and auxiliary classifiers are not included.

    Args:
        network: images → logits, in any form that ``get_logits`` accepts; unchanged, including modes and buffers.
        images: images (B, C, H, W) on the network's device; only the shape matters.
    """
    layers: dict[Node, nn.Module] = {}

    def record(layer: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            layers.setdefault(output.grad_fn, layer)

    hooks = [layer.register_forward_hook(record) for layer in network.modules() if _has_matrix(layer)]
    try:
        with eval_mode(network), torch.enable_grad():
            # Cloned, because a leaf tensor that requires gradients must not be modified in place.
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
            pending += [next_node for next_node, _ in node.next_functions]
    return list(heads)


def compute_in_float32(layer: nn.Module) -> None:
    """Makes a layer compute in float32 under autocast, in place; its parameters and state dict do not change."""
    layer.__class__ = _in_float32(type(layer))  # type: ignore[arg-type]  # mypy asks the class for its instances' hash


@contextmanager
def in_float32(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Context manager that makes layers compute in float32 under autocast, for layers of a user that must be restored."""
    classes = [(layer, type(layer)) for layer in layers]
    for layer, _ in classes:
        compute_in_float32(layer)
    try:
        yield
    finally:
        for layer, original_class in reversed(classes):
            layer.__class__ = original_class


def lower_precision(network: nn.Module, dtype: torch.dtype, images: Tensor) -> nn.Module:
    """Casts the weights of a frozen network's convolutions and linear layers in place, which autocast would cast in every call.

    Other layers stay in float32, as under autocast. The layers that compute the logits (:func:`find_heads`) keep float32 weights
    and compute in float32.

    Args:
        network: images → logits, with float32 weights.
        dtype: autocast's dtype.
        images: example images (B, C, H, W).

    Returns:
        The network.
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
    """PyTorch's spectral norm parametrization, computed in float32 under autocast, which would round its power iterations."""

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return super().forward(weight)


def keep_spectral_norms_in_float32(network: nn.Module) -> nn.Module:
    """Replaces every ``torch.nn.utils.parametrizations.spectral_norm`` of a network by :class:`SpectralNorm`, in place.

    Returns:
        The network.
    """
    for norm in network.modules():
        if type(norm) is _SpectralNorm:
            norm.__class__ = SpectralNorm
    return network


class Float32Layer(nn.Module):
    """Mixin of :func:`compute_in_float32`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, _to_float32, (args, kwargs))
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            return super().forward(*args, **kwargs)


def _to_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


@cache  # compiled networks have guards on the classes of their layers: a new class in every call would recompile them
def _in_float32(layer: type[nn.Module]) -> type[nn.Module]:
    return layer if issubclass(layer, Float32Layer) else type(layer.__name__, (Float32Layer, layer), {})


def _has_matrix(layer: nn.Module) -> bool:
    if isinstance(layer, torch.jit.ScriptModule):  # supports neither hooks nor a change of its class
        return False
    if isinstance(layer, nn.Linear | _ConvNd):
        return True
    # A user's layer. Modules with submodules are not layers, even with parameters such as a transformer's position embedding.
    return not any(True for _ in layer.children()) and any(parameter.ndim > 1 for parameter in layer.parameters(recurse=False))
