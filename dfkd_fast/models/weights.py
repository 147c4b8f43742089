"""Weights on disk: safetensors that say what network they belong to."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dfkd_fast.errors import DfkdError, first_line
from dfkd_fast.files import replacing

__all__ = ["load_weights", "read_metadata", "read_weights", "save_weights", "sha256_of"]

HEADER = "dfkd_fast"


def save_weights(network: nn.Module, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a network's state to a safetensors file, atomically, with metadata in its header.

    Equal content gives equal bytes: the format keeps several entries in no order, so there is one, as JSON.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    with replacing(path) as part:
        part.write_bytes(save(_untied(tensors), metadata={HEADER: json.dumps(dict(metadata))}))


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a safetensors file, or a PyTorch file that holds nothing but tensors, into a network.

    A PyTorch file may hold the state itself or have it under ``state_dict``, ``model`` or
    ``model_state_dict``, as trainers leave it, and under the ``module.`` that parallel training puts in front.

    Raises:
        DfkdError: no such file, not readable as weights, or weights of another network.
    """
    state = read_weights(path)
    if not any(name.startswith("module.") for name in network.state_dict()):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        problem = str(error).splitlines()[1:2] or [str(error)]
        raise DfkdError(f"weights {path} do not fit the network {type(network).__name__}: {problem[0].strip()[:300]}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """What :func:`save_weights` put in a file's header; empty for a file of any other origin."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(json.loads((file.metadata() or {}).get(HEADER, "{}")))
    except (SafetensorError, OSError, ValueError) as error:
        raise DfkdError(f"weights {path} cannot be read: {first_line(error)}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The named tensors of a file; see :func:`load_weights`.

    Raises:
        DfkdError: no such file, or not readable as weights.
    """
    if not path.is_file():
        raise DfkdError(f"weights {path} not found")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        held = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise DfkdError(f"weights {path} cannot be read: {first_line(error)}") from error
    except Exception as error:
        # What a damaged file raises has no common kind, and the text of a refused pickle advises to trust it.
        raise DfkdError(f"weights {path} cannot be read: no PyTorch file of plain tensors, or damaged") from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
    if not isinstance(held, Mapping) or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in held.items()):
        raise DfkdError(f"weights {path} hold no state dict: a file of named tensors is needed, not a whole network or a training state")
    return dict(held)


def sha256_of(network: nn.Module) -> str:
    """SHA-256 of a network's state dict, in hexadecimal digits: of names, dtypes, shapes and values, whatever their device and strides."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        if not isinstance(tensor, Tensor):  # a module's own extra state
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _untied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share memory, copied: safetensors refuses to store one memory under two names."""
    seen: set[int] = set()
    untied = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        untied[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return untied
