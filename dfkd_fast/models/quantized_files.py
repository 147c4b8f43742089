"""Files of quantized networks, whose weights take as many bits as they have."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dfkd_fast.errors import DfkdError
from dfkd_fast.surgery import FLOAT, quantize_layers, quantized_layers
from dfkd_fast.surgery.quantize import integer_range

from .weights import read_metadata, read_tensors, save_tensors

__all__ = ["load_quantized", "save_quantized"]

BITS = "bits"


def save_quantized(network: nn.Module, path: Path) -> None:
    """Writes a quantized network to a safetensors file, replaced atomically.

    The weights of quantized layers are stored as integers, packed without gaps: the bits of one after the other, lowest first. All other
    tensors keep their names, shapes and dtypes.

    Args:
        network: Network with layers of :func:`~dfkd_fast.surgery.quantize`.
        path: The file.
    """
    tensors = dict(network.state_dict())
    bits = {}
    for name, layer in quantized_layers(network).items():
        bits[name] = layer.weight_bits, layer.activation_bits
        if layer.weight_bits != FLOAT:
            key = f"{name}.weight" if name else "weight"
            tensors[key] = _pack(layer.integer_weight(), layer.weight_bits)
    save_tensors(tensors, path, {BITS: json.dumps(bits)})


def load_quantized(network: nn.Module, path: Path | str) -> nn.Module:
    """Quantizes a network in place as the one that :func:`save_quantized` wrote, and loads its weights; nothing of the file is executed.

    Args:
        network: Network of the same architecture.
        path: The file.

    Returns:
        The network in evaluation mode.

    Raises:
        DfkdError: The file does not exist, is damaged, is not one of :func:`save_quantized`, or does not fit the network.
    """
    path = Path(path)
    where = f"weights {path}"
    tensors = read_tensors(path)
    try:
        stored = json.loads(read_metadata(path)[BITS])
        bits = {name: (_checked(weight), _checked(activation)) for name, (weight, activation) in stored.items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DfkdError(f"{where} are not those of a quantized network") from error
    try:
        quantize_layers(network, bits)
    except (AttributeError, TypeError) as error:
        raise DfkdError(f"{where} do not fit the network {type(network).__name__}: its layers differ") from error
    for name, layer in quantized_layers(network).items():
        key = f"{name}.weight" if name else "weight"
        shape = layer._parameters["weight"].shape  # type: ignore[union-attr]
        if layer.weight_bits == FLOAT or key not in tensors:
            continue
        packed, scale = tensors[key], tensors.get(f"{key}_scale")
        fits = packed.dtype == torch.uint8 and packed.shape == (-(-shape.numel() * layer.weight_bits // 8),)
        if not fits or scale is None or scale.shape != shape[:1]:
            raise DfkdError(f"{where} do not fit the network {type(network).__name__}: size mismatch for {key}")
        tensors[key] = _unpack(packed, layer.weight_bits, shape) * scale.view(-1, *[1] * (len(shape) - 1))
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        problem = str(error).splitlines()[1:2] or [str(error)]
        raise DfkdError(f"{where} do not fit the network {type(network).__name__}: {problem[0].strip()[:300]}") from error
    network.eval()
    return network


def _checked(bits: Any) -> int:
    """Returns a number of bits from a file, or raises a :class:`ValueError`."""
    if type(bits) is not int or (bits not in range(2, 17) and bits != FLOAT):
        raise ValueError(bits)
    return bits


def _pack(integers: Tensor, bits: int) -> Tensor:
    """Returns the bits of signed integers as bytes (ceil(numel · bits / 8),)."""
    smallest, _ = integer_range(bits)
    values = (integers.flatten().to(torch.int32) - smallest).cpu().numpy()
    digits = (values[:, None] >> np.arange(bits)) & 1
    return torch.from_numpy(np.packbits(digits.astype(np.uint8).ravel(), bitorder="little"))


def _unpack(packed: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """Returns the signed integers of :func:`_pack` as float32, in their shape."""
    digits = np.unpackbits(packed.numpy(), count=shape.numel() * bits, bitorder="little").reshape(-1, bits).astype(np.int16)
    smallest, _ = integer_range(bits)
    return torch.from_numpy((digits << np.arange(bits)).sum(1) + smallest).float().view(shape)
