"""Weights on disk: safetensors that say what network they belong to, and the files that other trainers leave."""

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

from .selection import NAMED, convert, listed, select
from .weight_files import check_file, is_safetensors, read_weights

__all__ = ["load_weights", "read_metadata", "save_weights", "state_dict_sha256"]

HEADER, CHECKSUM = "dfkd_fast", "sha256"


def save_weights(network: nn.Module, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a network's state to a safetensors file, atomically, with metadata and a checksum of the tensors in its header.

    Equal content gives equal bytes: the format keeps several entries in no order, so there is one, as JSON.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    with replacing(path) as part:
        part.write_bytes(save(_untied(tensors), metadata={HEADER: json.dumps({**metadata, CHECKSUM: state_dict_sha256(tensors)})}))


def load_weights(network: nn.Module, path: Path | str, *, key: str = "", log: Callable[[str], None] = lambda note: None) -> None:
    """Load a safetensors or PyTorch file into a network; nothing from the file is executed.

    The file may hold the state itself, or a training state that has it under any keys. Prefixes of wrappers
    (``module.``, ``_orig_mod.``, ``model.``, …) are stripped where that makes the names those of the network, and
    nothing is loaded unless every name, shape and kind of number fits. Floating dtypes are converted to the network's.

    Args:
        network: what the weights are for.
        path: the file.
        key: where in the file the weights are, such as ``model_ema`` or ``state_dict.student``; needed where several
            states fit.
        log: called with one line that says what was taken and what was left out, unless it is the whole file.

    Raises:
        DfkdError: no such file, not readable without executing it, weights of another network, several states that fit
            and no key, values that are not finite, or another checksum than :func:`save_weights` wrote.
    """
    path = Path(path)
    own = {name: tensor for name, tensor in network.state_dict().items() if isinstance(tensor, Tensor)}
    where = f"weights {path}"
    held = read_weights(path)
    if (checksum := _header(path).get(CHECKSUM)) and checksum != state_dict_sha256(held):
        raise DfkdError(f"{where} are damaged: the content does not match the checksum in the header")
    chosen = select(held, own, where, key=key)
    if chosen.problems:
        under = f" under {chosen.label!r}" if chosen.label else ""
        problems = "; ".join(f"{kind} {listed(names)}" for kind, names in chosen.problems.items())
        part = re.search(r"-(\d+)-of-(\d+)\.", path.name)
        hint = f"; it is part {int(part[1])} of {int(part[2])}: join them into one file" if part else ""
        raise DfkdError(f"{where}{under} do not fit the network {type(network).__name__}: {problems}{hint}")
    converted = {name: convert(where, name, tensor, own[name]) for name, tensor in chosen.tensors.items()}
    _check_tied(where, own, converted)
    try:
        network.load_state_dict(converted)
    except RuntimeError as error:  # of a network that keeps more than tensors, or loads in a way of its own
        problem = str(error).splitlines()[1:2] or [str(error)]
        raise DfkdError(f"{where} do not fit the network {type(network).__name__}: {problem[0].strip()[:300]}") from error
    if chosen.label or chosen.left_out:
        taken = f"{chosen.label!r} ({len(chosen.tensors)} tensors)" if chosen.label else f"{len(chosen.tensors)} tensors"
        log(f"{where}: took {taken}" + (f", left out {listed(map(repr, chosen.left_out), 2 * NAMED)}" if chosen.left_out else ""))


def _check_tied(where: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in given.items():
        if is_lazy(own[name]):
            continue
        place = own[name].data_ptr(), own[name].shape, own[name].stride()
        if own[name].numel() and not own[name].is_meta and not torch.equal(given[first.setdefault(place, name)], tensor):
            raise DfkdError(f"{where}: {first[place]} and {name} are one tensor in the network, and differ in the file")


def read_metadata(path: Path) -> dict[str, str]:
    """What :func:`save_weights` put in a file's header; empty for a file of any other origin.

    Raises:
        DfkdError: the header cannot be read, or holds something else under the name of this package.
    """
    return {name: value for name, value in _header(path).items() if name != CHECKSUM}


def _header(path: Path) -> dict[str, str]:
    check_file(path)
    try:
        if not is_safetensors(path):
            return {}
        with safe_open(path, framework="pt") as file:
            held = json.loads((file.metadata() or {}).get(HEADER, "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise DfkdError(f"weights {path} cannot be read: {first_line(error)}") from error
    if not isinstance(held, dict) or not all(isinstance(value, str) for value in held.values()):
        raise DfkdError(f"weights {path} cannot be read: {HEADER!r} in its header must be a table of strings")
    return held


def state_dict_sha256(state: Mapping[str, Any]) -> str:
    """SHA-256 of a state dict's tensors, in hexadecimal digits: of names, dtypes, shapes and values, whatever their order and strides."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
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
