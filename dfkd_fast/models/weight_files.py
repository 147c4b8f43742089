"""Files of weights, as this program and others leave them, read without executing anything from them."""

import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dfkd_fast.errors import DfkdError, first_line

__all__ = ["check_file", "is_safetensors", "read_weights"]


class _Discarded:
    """Stands for an object of numpy: accepts what the file would build it with, and keeps nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> "_Discarded":
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


class _Settings:
    """Stands for an object that holds settings: an empty dictionary, which the unpickler may fill, as it does any other."""

    def __new__(cls, *args: object, **kwargs: object) -> OrderedDict[str, object]:  # type: ignore[misc]
        return OrderedDict()


# What trainers store beside weights. None of these names is ever imported or called, whatever they stand for: PyTorch's restricted
# unpickler is told that each is one of the two classes above, whose methods do nothing. So a file gains no more from naming them
# than from a plain dictionary, and what they held is lost, which is fine, for only named tensors are taken from a file.
STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    *((_Discarded, f"numpy.{name}") for name in ("dtype", "ndarray")),
    *((_Discarded, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(
        (_Settings, name)
        for name in (
            "argparse.Namespace",
            "types.SimpleNamespace",
            "collections.defaultdict",
            *(f"pathlib.{kind}" for kind in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
            *(f"pathlib._local.{kind}" for kind in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
            *(f"builtins.{kind}" for kind in ("dict", "list", "tuple", "str", "int", "float", "bool")),
            "easydict.EasyDict",
            "yacs.config.CfgNode",
            *(f"{package}.utilities.parsing.AttributeDict" for package in ("pytorch_lightning", "lightning.pytorch")),
            *(f"{package}.utilities.data.AttributeDict" for package in ("lightning_fabric", "lightning.fabric")),
        )
    ),
]


def read_weights(path: Path) -> Mapping[Any, Any]:
    """What a file holds, on the CPU: named tensors, or dictionaries with such at some depth. Nothing from it is executed.

    Raises:
        DfkdError: no such file, or not readable as weights; the line says how such a file is converted, where that is known.
    """
    check_file(path)
    try:
        if known := _known_otherwise(path):
            raise DfkdError(f"weights {path} cannot be read: {known}")
        if is_safetensors(path):
            return load_file(path)
        # An open file, for PyTorch goes by the suffix of a path; what it warns of here is an error below, with its cause.
        with path.open("rb") as file, torch.serialization.safe_globals(STAND_INS), warnings.catch_warnings(action="ignore"):
            held = torch.load(file, map_location="cpu", weights_only=True)
    except DfkdError:
        raise
    except (SafetensorError, OSError) as error:
        raise DfkdError(f"weights {path} cannot be read: {first_line(error)}") from error
    except Exception as error:
        # What a damaged file raises has no common kind, and the text of a refused pickle advises to trust it.
        raise DfkdError(f"weights {path} cannot be read: {_refusal(error)}") from error
    if not isinstance(held, Mapping):
        raise DfkdError(f"weights {path} hold no state dict but a {type(held).__name__}: a file of named tensors is needed")
    return held


def check_file(path: Path) -> None:
    """Raise a :class:`DfkdError` where no file is at a path, or something that is none: to read a pipe or a device may never end."""
    if not path.exists():
        raise DfkdError(f"weights {path} not found")
    if not path.is_file():
        raise DfkdError(f"weights {path} {'are a folder' if path.is_dir() else 'are a pipe or a device'}: a file is needed")


def is_safetensors(path: Path) -> bool:
    """Whether a file is safetensors by its content: a length that it has, and a JSON object; a damaged one goes by its suffix."""
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith((b"PK\x03\x04", b"\x80\x02\x8a\x0a")):
        return False
    whole = head[8:] == b"{" and 8 + int.from_bytes(head[:8], "little") <= path.stat().st_size
    return whole or path.suffix == ".safetensors"


def _known_otherwise(path: Path) -> str:
    """What a file is that is often taken for weights, and what to do about it; empty for all others."""
    with path.open("rb") as file:
        head = file.read(4096)
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS: fetch the file itself by git lfs pull"
    if head.lstrip()[:9].lower() in (b"<!doctype", b"<html>"):
        return "it is a web page: a download that failed"
    if head.lstrip().startswith(b"{") and (path.suffix == ".json" or b'"weight_map"' in head):
        return "it is the index of a sharded file: join its parts into one file"
    return ""


def _refusal(error: Exception) -> str:
    """Why PyTorch's restricted unpickler refused a file, in our words."""
    if "TorchScript" in str(error):
        return "it is a TorchScript archive: convert it by torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt')"
    if named := re.search(r"GLOBAL (\S+)|class '?([\w.]+)|function <\w+ (\S+)", str(error)):
        name = ascii(next(filter(None, named.groups())))[1:-1]
        return (
            f"it needs {name}, and nothing that a file names is executed; where the code of the network is, store its tensors alone:"
            " torch.save(network.state_dict(), 'weights.pt')"
        )
    return "no PyTorch file of plain tensors, or damaged"
