"""Files of quantized networks, whose weights take as many bits as they have."""

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from dfkd_fast.errors import DfkdError
from dfkd_fast.surgery import FLOAT, quantize_layers, quantized_layers
from dfkd_fast.surgery.quantize import BIT_COUNTS, integer_range

from .weights import read_tensors, save_tensors

__all__ = ["is_quantized_file", "load_quantized", "save_quantized"]

BITS = "bits"
"""Key of a quantized layer's bits: of its weights and of its inputs, (2,) uint8. As a tensor they are part of the file's checksum."""


def save_quantized(network: nn.Module, path: Path) -> None:
    """Writes a quantized network to a safetensors file, replaced atomically.

    The weights of quantized layers are stored as integers, packed without gaps: the bits of one after the other, lowest first. All other
    tensors keep their names, shapes and dtypes; ``NAME.bits`` of each quantized layer is added.

    Args:
        network: Network with layers of :func:`~dfkd_fast.surgery.quantize`.
        path: The file.
    """
    tensors = dict(network.state_dict())
    for name, layer in quantized_layers(network).items():
        tensors[_key(name, BITS)] = torch.tensor([layer.weight_bits, layer.activation_bits], dtype=torch.uint8)
        if layer.weight_bits != FLOAT:
            tensors[_key(name, "weight")] = _pack(layer.integer_weight(), layer.weight_bits)
    save_tensors(tensors, path, {})


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
    of_bits = {key: tensors.pop(key) for key in list(tensors) if key == BITS or key.endswith(f".{BITS}")}
    if not of_bits or not all(map(_are_bits, of_bits.values())):
        raise DfkdError(f"{where} are not those of a quantized network")
    bits = {key.removesuffix(BITS).removesuffix("."): (int(tensor[0]), int(tensor[1])) for key, tensor in of_bits.items()}
    try:
        quantize_layers(network, bits)
    except (AttributeError, TypeError) as error:
        raise DfkdError(f"{where} do not fit the network {type(network).__name__}: its layers differ") from error
    for name, layer in quantized_layers(network).items():
        key = _key(name, "weight")
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


def is_quantized_file(path: Path) -> bool:
    """Whether :func:`save_quantized` wrote a file; its weights are not read."""
    if path.suffix != ".safetensors":
        return False
    with safe_open(path, "pt") as file:
        keys = [key for key in file.keys() if key == BITS or key.endswith(f".{BITS}")]  # noqa: SIM118, the file is not iterable
        return bool(keys) and all(_are_bits(file.get_tensor(key)) for key in keys)


def _key(layer: str, tensor: str) -> str:
    return f"{layer}.{tensor}" if layer else tensor


def _are_bits(tensor: Tensor) -> bool:
    """Whether a tensor of a file holds the bits of a layer's weights and inputs."""
    return tensor.dtype == torch.uint8 and tensor.shape == (2,) and set(tensor.tolist()) <= set(BIT_COUNTS)


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
