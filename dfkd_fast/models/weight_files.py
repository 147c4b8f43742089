"""Reads weights files of this program and of other training code without executing anything from them."""

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
    """Stand-in for NumPy objects: accepts any constructor arguments and state, and stores nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> "_Discarded":
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


class _Settings:
    """Stand-in for configuration objects: an empty dictionary that the unpickler may fill."""

    def __new__(cls, *args: object, **kwargs: object) -> OrderedDict[str, object]:  # type: ignore[misc]
        return OrderedDict()


# Classes that training code often stores beside the weights. They are never imported or called: PyTorch's restricted unpickler maps
# each name to one of the two classes above, whose methods do nothing. Such a name in a file therefore has no more effect than a
# plain dictionary. The objects' contents are lost, but only named tensors are read from a file anyway.
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
    """Reads a safetensors or PyTorch file to the CPU without executing anything from it.

    Returns:
        A mapping of names to tensors, or nested mappings that contain such.

    Raises:
        DfkdError: the file does not exist or cannot be read as weights; the message says how to convert the file if that is known.
    """
    check_file(path)
    try:
        if reason := _not_weights_reason(path):
            raise DfkdError(f"weights {path} cannot be read: {reason}")
        if is_safetensors(path):
            return load_file(path)
        # A file object, because PyTorch interprets the suffix of a path. Its warnings are errors with a reason below.
        with path.open("rb") as file, torch.serialization.safe_globals(STAND_INS), warnings.catch_warnings(action="ignore"):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except DfkdError:
        raise
    except (SafetensorError, OSError) as error:
        raise DfkdError(f"weights {path} cannot be read: {first_line(error)}") from error
    except Exception as error:
        # Damaged files raise exceptions of any type, and PyTorch's message for an unsafe pickle recommends weights_only=False.
        raise DfkdError(f"weights {path} cannot be read: {_load_error_message(error)}") from error
    if not isinstance(content, Mapping):
        raise DfkdError(f"weights {path} contain no state dict but a {type(content).__name__}: must be a file of named tensors")
    return content


def check_file(path: Path) -> None:
    """Raises a :class:`DfkdError` if ``path`` does not exist or is not a regular file; reading a pipe or device might never end."""
    if not path.exists():
        raise DfkdError(f"weights {path} not found")
    if not path.is_file():
        raise DfkdError(f"weights {path} must be a file, not a {'folder' if path.is_dir() else 'pipe or device'}")


def is_safetensors(path: Path) -> bool:
    """Returns True if a file starts with a valid safetensors header, or is unrecognizable and has the suffix ``.safetensors``."""
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith((b"PK\x03\x04", b"\x80\x02\x8a\x0a")):
        return False
    has_header = head[8:] == b"{" and 8 + int.from_bytes(head[:8], "little") <= path.stat().st_size
    return has_header or path.suffix == ".safetensors"


def _not_weights_reason(path: Path) -> str:
    """Returns what a file is if it is commonly mistaken for weights, and how to get the weights; otherwise an empty string."""
    with path.open("rb") as file:
        head = file.read(4096)
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer: fetch the file itself with git lfs pull"
    if head.lstrip()[:9].lower() in (b"<!doctype", b"<html>"):
        return "it is an HTML page, probably of a failed download"
    if head.lstrip().startswith(b"{") and (path.suffix == ".json" or b'"weight_map"' in head):
        return "it is the index of a sharded checkpoint: merge its shards into one file"
    return ""


def _load_error_message(error: Exception) -> str:
    """Returns why ``torch.load`` rejected a file, and how to convert it if that is known."""
    if "TorchScript" in str(error):
        return "it is a TorchScript archive: convert it with torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt')"
    if match := re.search(r"GLOBAL (\S+)|class '?([\w.]+)|function <\w+ (\S+)", str(error)):
        name = ascii(next(filter(None, match.groups())))[1:-1]
        return (
            f"it requires {name}, and code from weights files is never executed; where the network's code is available, save only its"
            " tensors: torch.save(network.state_dict(), 'weights.pt')"
        )
    return "it is damaged or not a PyTorch file of tensors"
