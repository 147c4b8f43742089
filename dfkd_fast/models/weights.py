"""Saves weights as safetensors files with metadata, and loads them and the files of other training code."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dfkd_fast.errors import DfkdError, first_line
from dfkd_fast.files import replacing

from .selection import MAX_NAMES, convert, join_names, select
from .shipped import weights_path
from .weight_files import check_file, is_safetensors, read_weights

__all__ = ["load_weights", "read_metadata", "read_tensors", "save_tensors", "save_weights", "state_dict_sha256"]

HEADER, CHECKSUM = "dfkd_fast", "sha256"


def save_weights(network: nn.Module, path: Path, metadata: Mapping[str, str]) -> None:
    """Writes a network's state dict to a safetensors file atomically, with metadata and a SHA-256 checksum of the tensors.

    Equal weights and metadata give equal bytes. Since safetensors does not preserve the order of metadata entries, the file has
    a single entry that contains all metadata as JSON.

    Args:
        network: the network.
        path: the file, replaced if it exists.
        metadata: returned by :func:`read_metadata`.
    """
    save_tensors(network.state_dict(), path, metadata)


def save_tensors(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes tensors to a file as :func:`save_weights` does."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with replacing(path) as part:
        part.write_bytes(save(_clone_shared(tensors), metadata={HEADER: json.dumps({**metadata, CHECKSUM: state_dict_sha256(tensors)})}))


def load_weights(network: nn.Module, path: Path | str, *, key: str = "", log: Callable[[str], None] = lambda note: None) -> None:
    """Loads a safetensors or PyTorch file into a network without executing anything from the file.

    The file may be a state dict or a training checkpoint that contains one under any key. Wrapper prefixes (``module.``,
    ``_orig_mod.``, ``model.``, …) are stripped if the keys then match the network's. Nothing is loaded unless all keys, shapes
    and dtype kinds (floating-point or integer) match. Floating-point tensors are converted to the network's dtypes.

    Args:
        network: the network, changed in place.
        path: the file, or ``shipped:NAME`` for a teacher of this package.
        key: key of the weights in the file, such as ``model_ema`` or ``state_dict.student``; required if several state dicts fit.
        log: called with one line that says what was loaded and what was ignored, unless the whole file was loaded.

    Raises:
        DfkdError: the file does not exist, cannot be read without executing it, does not match the network, has several state
            dicts that fit while ``key`` is empty, has values that are not finite, or does not match its checksum.
    """
    path = weights_path(path)
    expected = {name: tensor for name, tensor in network.state_dict().items() if isinstance(tensor, Tensor)}
    where = f"weights {path}"
    content = read_tensors(path)
    selection = select(content, expected, where, key=key)
    if selection.problems:
        under = f" under {selection.label!r}" if selection.label else ""
        problems = "; ".join(f"{kind} {join_names(names)}" for kind, names in selection.problems.items())
        shard = re.search(r"-(\d+)-of-(\d+)\.", path.name)
        hint = f"; the file is shard {int(shard[1])} of {int(shard[2])}: merge the shards into one file" if shard else ""
        raise DfkdError(f"{where}{under} do not fit the network {type(network).__name__}: {problems}{hint}")
    converted = {name: convert(where, name, tensor, expected[name]) for name, tensor in selection.tensors.items()}
    _check_tied(where, expected, converted)
    try:
        network.load_state_dict(converted)
    except RuntimeError as error:  # from a network with extra state or a load_state_dict of its own
        problem = str(error).splitlines()[1:2] or [str(error)]
        raise DfkdError(f"{where} do not fit the network {type(network).__name__}: {problem[0].strip()[:300]}") from error
    if selection.label or selection.left_out:
        count = f"{len(selection.tensors)} tensors"
        loaded = f"{selection.label!r} ({count})" if selection.label else count
        ignored = f", ignored {join_names(map(repr, selection.left_out), 2 * MAX_NAMES)}" if selection.left_out else ""
        log(f"{where}: loaded {loaded}{ignored}")


def read_tensors(path: Path) -> dict[str, Any]:
    """Returns the content of a weights file, see :func:`~dfkd_fast.models.weight_files.read_weights`.

    Raises:
        DfkdError: as there, or the file does not match its checksum.
    """
    content = read_weights(path)
    if (checksum := _read_header(path).get(CHECKSUM)) and checksum != state_dict_sha256(content):
        raise DfkdError(f"weights {path} are damaged: the content does not match the checksum in the header")
    return dict(content)


def _check_tied(where: str, expected: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    """Raises a :class:`DfkdError` if tensors that are tied in the network differ in the file."""
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in loaded.items():
        target = expected[name]
        if is_lazy(target):
            continue
        storage = target.data_ptr(), target.shape, target.stride()
        if target.numel() and not target.is_meta and not torch.equal(loaded[first.setdefault(storage, name)], tensor):
            raise DfkdError(f"{where}: {first[storage]} and {name} are tied in the network but differ in the file")


def read_metadata(path: Path) -> dict[str, str]:
    """Returns the metadata that :func:`save_weights` wrote to a file; empty for files of other programs.

    Raises:
        DfkdError: the file does not exist, or its header is invalid.
    """
    return {name: value for name, value in _read_header(path).items() if name != CHECKSUM}


def _read_header(path: Path) -> dict[str, str]:
    check_file(path)
    try:
        if not is_safetensors(path):
            return {}
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(HEADER, "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise DfkdError(f"weights {path} cannot be read: {first_line(error)}") from error
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DfkdError(f"weights {path} cannot be read: {HEADER!r} in its header must be a JSON object of strings")
    return metadata


def state_dict_sha256(state: Mapping[str, Any]) -> str:
    """Returns the SHA-256 digest of a state dict's names, dtypes, shapes and values as hexadecimal digits.

    The digest does not depend on the order, devices or strides of the tensors. Entries that are not tensors are ignored.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        if not isinstance(tensor, Tensor):  # from get_extra_state
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _clone_shared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Clones all but the first of the tensors that share a storage, because safetensors rejects shared storages."""
    storages: set[int] = set()
    unshared = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        unshared[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return unshared
