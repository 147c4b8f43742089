"""Weights on disk: safetensors that say what network they belong to, and the files that other trainers leave."""

import hashlib
import json
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dfkd_fast.errors import DfkdError, first_line
from dfkd_fast.files import replacing

__all__ = [
    "ENCODERS",
    "WRAPPERS",
    "Selection",
    "convert",
    "load_weights",
    "read_metadata",
    "read_weights",
    "save_weights",
    "select",
    "sha256_of",
]

HEADER = "dfkd_fast"

WRAPPERS = frozenset({"module", "_orig_mod", "model", "net", "network", "student", "teacher", "ema", "ema_model", "model_ema"})
"""Parts that a trainer puts before the names of the network it holds."""
ENCODERS = WRAPPERS | {"features"}
"""The same of an encoder; torchvision's mobile networks have theirs under ``features``."""
TRANSPARENT = frozenset({"module", "_orig_mod"})
"""Parts that DataParallel and torch.compile put anywhere in a name, for they wrap parts of a network, too."""
BOOKKEEPING = frozenset({"n_averaged", "updates", "total_ops", "total_params"})
"""Buffers that averages (AveragedModel, FusedEMA) and profilers (thop) leave among the weights."""
DEPTH = 4
"""Dictionaries within dictionaries in which weights are looked for."""
NAMED = 3
"""Names in an error."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


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


class Selection(NamedTuple):
    """The tensors of a file that a network is given."""

    label: str
    """Keys and prefix that lead to them, joined by dots; empty where they are the whole file."""
    tensors: dict[str, Tensor]
    """By the network's own names."""
    left_out: list[str]
    """What else the file holds."""
    problems: dict[str, list[str]]
    """Why they do not fit, by its kind; empty if they fit."""


def save_weights(network: nn.Module, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a network's state to a safetensors file, atomically, with metadata in its header.

    Equal content gives equal bytes: the format keeps several entries in no order, so there is one, as JSON.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    with replacing(path) as part:
        part.write_bytes(save(_untied(tensors), metadata={HEADER: json.dumps(dict(metadata))}))


def load_weights(network: nn.Module, path: Path, *, key: str = "", log: Callable[[str], None] = lambda note: None) -> None:
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
            and no key, or values that are not finite.
    """
    own = {name: tensor for name, tensor in network.state_dict().items() if isinstance(tensor, Tensor)}
    where = f"weights {path}"
    chosen = select(read_weights(path), own, where, key=key)
    if chosen.problems:
        under = f" under {chosen.label!r}" if chosen.label else ""
        problems = "; ".join(f"{kind} {_listed(names)}" for kind, names in chosen.problems.items())
        part = re.search(r"-(\d+)-of-(\d+)\.", path.name)
        hint = f"; it is part {int(part[1])} of {int(part[2])}: join them into one file" if part else ""
        raise DfkdError(f"{where}{under} do not fit the network {type(network).__name__}: {problems}{hint}")
    converted = {name: convert(where, name, tensor, own[name]) for name, tensor in chosen.tensors.items()}
    try:
        network.load_state_dict(converted)
    except RuntimeError as error:  # of a network that keeps more than tensors, or loads in a way of its own
        problem = str(error).splitlines()[1:2] or [str(error)]
        raise DfkdError(f"{where} do not fit the network {type(network).__name__}: {problem[0].strip()[:300]}") from error
    if chosen.label or chosen.left_out:
        taken = f"{chosen.label!r} ({len(chosen.tensors)} tensors)" if chosen.label else f"{len(chosen.tensors)} tensors"
        log(f"{where}: took {taken}" + (f", left out {_listed(map(repr, chosen.left_out), 2 * NAMED)}" if chosen.left_out else ""))


def read_metadata(path: Path) -> dict[str, str]:
    """What :func:`save_weights` put in a file's header; empty for a file of any other origin.

    Raises:
        DfkdError: the header cannot be read, or holds something else under the name of this package.
    """
    try:
        if not _is_safetensors(path):
            return {}
        with safe_open(path, framework="pt") as file:
            held = json.loads((file.metadata() or {}).get(HEADER, "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise DfkdError(f"weights {path} cannot be read: {first_line(error)}") from error
    if not isinstance(held, dict) or not all(isinstance(value, str) for value in held.values()):
        raise DfkdError(f"weights {path} cannot be read: {HEADER!r} in its header must be a table of strings")
    return held


def read_weights(path: Path) -> Mapping[Any, Any]:
    """What a file holds, on the CPU: named tensors, or dictionaries with such at some depth. Nothing from it is executed.

    Raises:
        DfkdError: no such file, or not readable as weights; the line says how such a file is converted, where that is known.
    """
    if not path.is_file():
        raise DfkdError(f"weights {path} not found")
    try:
        if known := _known_otherwise(path):
            raise DfkdError(f"weights {path} cannot be read: {known}")
        if _is_safetensors(path):
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


def select(
    held: Mapping[Any, Any],
    own: Mapping[str, Tensor],
    where: str,
    *,
    key: str = "",
    choose: str = "choose by --weights-key (teacher.weights_key, key=)",
    wrappers: frozenset[str] = WRAPPERS,
    partial: bool = False,
) -> Selection:
    """The one state in a file's content that fits a network; the nearest one, with its problems, if none does.

    Args:
        held: what :func:`read_weights` returned.
        own: the network's tensors by name.
        where: what errors begin with.
        key: which state is meant, where several fit.
        choose: what a user can do where several fit.
        wrappers: parts of prefixes that may be stripped; those of the key may be, too.
        partial: whether the state may have more tensors than the network.

    Raises:
        DfkdError: the content has no named tensors, nothing under the key, or several states that fit.
    """
    words = wrappers | set(key.split(".")) if key else wrappers
    options: dict[tuple[str, frozenset[str]], Selection] = {}
    for path, state in _states(held):
        for prefix in _prefixes(state, words):
            names, option = _fitted(held, path, state, prefix, own, partial)
            # Prefixes that come to the same tensors are one option: the shortest that fits.
            if (path, names) not in options or (options[path, names].problems and not option.problems):
                options[path, names] = option
    if not options:
        found = _listed(map(repr, held), 2 * NAMED) or "nothing"
        raise DfkdError(f"{where} hold no state dict: named tensors are needed, not a whole network or a training state; there are {found}")
    among = [option for option in options.values() if not key or f".{key}." in f".{option.label}."]
    fitting = [option for option in among if not option.problems]
    if not among:
        there = _listed((repr(option.label) for option in options.values() if option.label), 2 * NAMED) or "no keys, only named tensors"
        raise DfkdError(f"{where}: the weights key {key!r} is not in the file; there are {there}")
    exact = [option for option in fitting if option.label == key]
    if len(fitting) == 1 or exact:
        return (exact or fitting)[0]
    if fitting:
        several = " and ".join(repr(option.label) for option in fitting)
        raise DfkdError(f"{where} hold several states that fit the network, {several}: {choose}")
    return min(among, key=lambda option: sum(map(len, option.problems.values())))


def convert(where: str, name: str, tensor: Tensor, own: Tensor) -> Tensor:
    """A tensor of a file, on the device and in the dtype of the network's own.

    Raises:
        DfkdError: it is sparse, quantised or has no values, is of another kind of number than the network's, is not finite, or
            is out of the range of the network's integers.
    """
    if tensor.is_quantized or tensor.is_meta or tensor.is_nested or tensor.layout != torch.strided:
        kind = "quantised" if tensor.is_quantized else "without values" if tensor.is_meta else "sparse or nested"
        raise DfkdError(f"{where}: {name} is {kind} ({_short(tensor.dtype)}): a plain tensor is needed, as of dequantize() or to_dense()")
    if _kind(tensor.dtype) != _kind(own.dtype):
        allowed = {"float": "float16, bfloat16, float32 or float64", "integer": "an integer"}.get(_kind(own.dtype), _short(own.dtype))
        raise DfkdError(f"{where}: {name} is {_short(tensor.dtype)}: must be {allowed}")
    value = tensor.detach().to(own.device, own.dtype)
    # A mask of -inf is no damage where the network itself has it.
    if not (finite := value.isfinite()).all() and (is_lazy(own) or not (finite | (value == own)).all()):
        cause = "NaN or infinite" if not tensor.isfinite().all() else f"infinite in {_short(own.dtype)}"
        raise DfkdError(f"{where}: {name} has {int((~finite).sum())} of {value.numel()} values that are {cause}: must be finite")
    if own.dtype in INTEGERS and not torch.equal(value.long(), tensor.to(own.device).long()):
        raise DfkdError(f"{where}: {name} is {_short(tensor.dtype)} with values that {_short(own.dtype)} cannot hold")
    return value


def _kind(dtype: torch.dtype) -> str:
    """Between what dtypes weights are converted: floats, integers, and each of the others only to itself."""
    return "float" if dtype in FLOATS else "integer" if dtype in INTEGERS else str(dtype)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _states(held: Mapping[Any, Any], path: str = "", depth: int = 0) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """The mappings of names to tensors, and the keys that lead to them."""
    if all(isinstance(name, str) and isinstance(value, Tensor) for name, value in held.items()):
        if held or not path:
            yield path, held
    elif depth < DEPTH:
        for name, value in held.items():
            if isinstance(name, str) and isinstance(value, Mapping):
                yield from _states(value, f"{path}.{name}" if path else name, depth + 1)


def _prefixes(state: Mapping[str, Tensor], words: frozenset[str]) -> list[str]:
    """What may stand before the network's own names: parts that wrappers are known by; shortest first."""
    found = {""}
    for name in state:
        prefix = ""
        for part in name.split(".")[:-1]:
            if part not in words:
                break
            prefix += f"{part}."
            found.add(prefix)
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def _fitted(
    held: Mapping[Any, Any], path: str, state: Mapping[str, Tensor], prefix: str, own: Mapping[str, Tensor], partial: bool
) -> tuple[frozenset[str], Selection]:
    """What a network finds in a state behind a prefix; first the names there of the tensors that it is given."""
    plain = {_plain(name): name for name in own}
    if len(plain) < len(own):
        plain = {}  # the network's own names differ in those parts
    tensors: dict[str, Tensor] = {}
    taken, unexpected, outside = set(), [], []
    for name, tensor in state.items():
        rest = name.removeprefix(prefix)
        target = rest if rest in own else plain.get(_plain(rest))
        last = name.rpartition(".")[2]
        if not name.startswith(prefix):
            outside.append(last if last in BOOKKEEPING else name.partition(".")[0])
        elif target is not None and target not in tensors:
            tensors[target] = tensor
            taken.add(name)
        elif partial or last in BOOKKEEPING:
            outside.append(last if last in BOOKKEEPING else name)
        else:
            unexpected.append(name)
    # Batch norms of before PyTorch 0.4.1 did not count batches, and PyTorch fills that in.
    missing = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    differing = [
        f"{name} ({tuple(tensors[name].shape)} in the file, {tuple(theirs.shape)} in the network)"
        for name, theirs in own.items()
        if name in tensors and not is_lazy(theirs) and tensors[name].shape != theirs.shape
    ]
    problems = {"Missing keys": missing, "Unexpected keys": unexpected, "size mismatch for": differing}
    label = ".".join(filter(None, (path, prefix.removesuffix("."))))
    above = f"{path}." if path else ""
    left_out = [*_beside(held, path), *dict.fromkeys(f"{above}{name}" for name in outside)]
    return frozenset(taken), Selection(label, tensors, left_out, {kind: names for kind, names in problems.items() if names})


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in TRANSPARENT)


def _beside(held: Mapping[Any, Any], path: str, above: str = "") -> Iterator[str]:
    """The keys that do not lead to a path."""
    if not path:
        return
    # A key may have dots itself.
    on = next(name for name in held if isinstance(name, str) and (path == name or path.startswith(f"{name}.")))
    yield from (f"{above}{name}" for name in held if name != on)
    yield from _beside(held[on], path[len(on) + 1 :], f"{above}{on}.")


def _listed(names: Iterable[str], count: int = NAMED) -> str:
    """The first few names, and how many more there are."""
    every = list(names)
    return ", ".join(every[:count]) + (f" and {len(every) - count} more" if len(every) > count else "")


def _is_safetensors(path: Path) -> bool:
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
