"""Which of the tensors in a file are a network's, and under which of its names."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from dfkd_fast.errors import DfkdError

__all__ = ["ENCODERS", "NAMED", "WRAPPERS", "Selection", "convert", "listed", "select"]

WRAPPERS = frozenset({"module", "_orig_mod", "model", "net", "network", "student", "teacher", "ema", "ema_model", "model_ema"})
"""Parts that a trainer puts before the names of the network it holds."""
ENCODERS = WRAPPERS | {"features"}
"""The same of an encoder; torchvision's mobile networks have theirs under ``features``."""
TRANSPARENT = frozenset({"module", "_orig_mod"})
"""Parts that DataParallel and torch.compile put anywhere in a name, for they wrap parts of a network, too."""
BOOKKEEPING = frozenset({"n_averaged", "updates", "total_ops", "total_params"})
"""Buffers that averages (AveragedModel, FusedEMA) and profilers (thop) leave among the weights."""
ROOT = "."
"""The key of a state that has no key or prefix, beside others."""
DEPTH = 4
"""Dictionaries within dictionaries in which weights are looked for."""
NAMED = 3
"""Names in an error."""
LENGTH = 200
"""Letters of a name in an error."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


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


def select(
    held: Mapping[Any, Any],
    own: Mapping[str, Tensor],
    where: str,
    *,
    key: str = "",
    choose: str = "choose by key= or teacher.weights_key",
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
        prefixes = _prefixes(state, words)
        for prefix in prefixes:
            # Names behind a longer prefix are another state's.
            others = tuple(longer for longer in prefixes if longer != prefix and longer.startswith(prefix))
            names, option = _fitted(held, path, state, prefix, others, own, partial)
            # Prefixes that come to the same tensors are one option: the shortest that fits.
            if (path, names) not in options or (options[path, names].problems and not option.problems):
                options[path, names] = option
    if not options:
        found = listed(map(repr, held), 2 * NAMED) or "nothing"
        raise DfkdError(f"{where} hold no state dict: named tensors are needed, not a whole network or a training state; there are {found}")
    among = [option for option in options.values() if not key or f".{key}." in f".{option.label}." or (key, option.label) == (ROOT, "")]
    fitting = [option for option in among if not option.problems]
    if not among:
        there = listed((repr(option.label) for option in options.values() if option.label), 2 * NAMED) or "no keys, only named tensors"
        raise DfkdError(f"{where}: the weights key {key!r} is not in the file; there are {there}")
    exact = [option for option in fitting if key and (option.label or ROOT) == key]
    if len(fitting) == 1 or exact:
        return (exact or fitting)[0]
    if fitting:
        several = " and ".join(repr(option.label or ROOT) for option in fitting)
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
    tensors = {name: value for name, value in held.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if tensors or not (held or path):
        yield path, tensors
    if depth < DEPTH:
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
    held: Mapping[Any, Any],
    path: str,
    state: Mapping[str, Tensor],
    prefix: str,
    others: tuple[str, ...],
    own: Mapping[str, Tensor],
    partial: bool,
) -> tuple[frozenset[str], Selection]:
    """What a network finds in a state behind a prefix; first the names there of the tensors that it is given."""
    plain = {_plain(name): name for name in own}
    if len(plain) < len(own):
        plain = {}  # the network's own names differ in those parts
    tensors: dict[str, Tensor] = {}
    taken, unexpected, outside = set(), [], []
    # The network's own names first, then those that come to one of them.
    for name, tensor in sorted(state.items(), key=lambda item: item[0].removeprefix(prefix) not in own):
        rest = name.removeprefix(prefix)
        target = rest if rest in own else plain.get(_plain(rest))
        last = name.rpartition(".")[2]
        if not name.startswith(prefix):
            outside.append(last if last in BOOKKEEPING else name.partition(".")[0])
        elif target is not None and target not in tensors:
            tensors[target] = tensor
            taken.add(name)
        elif last in BOOKKEEPING:
            outside.append(last)
        elif others and name.startswith(others):
            outside.append(name.partition(".")[0])
        elif partial:
            outside.append(name)
        else:
            unexpected.append(name)
    # Batch norms of before PyTorch 0.4.1 did not count batches, and PyTorch fills that in.
    missing = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    differing = [
        f"{name} ({tuple(tensors[name].shape)} in the file, {tuple(theirs.shape)} in the network)"
        for name, theirs in own.items()
        if name in tensors and not is_lazy(theirs) and not tensors[name].is_nested and tensors[name].shape != theirs.shape
    ]
    problems = {"Missing keys": missing, "Unexpected keys": unexpected, "size mismatch for": differing}
    label = ".".join(filter(None, (path, prefix.removesuffix("."))))
    above = f"{path}." if path else ""
    left_out = [*_beside(held, path, state), *dict.fromkeys(f"{above}{name}" for name in outside)]
    return frozenset(taken), Selection(label, tensors, left_out, {kind: names for kind, names in problems.items() if names})


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in TRANSPARENT)


def _beside(held: Mapping[Any, Any], path: str, state: Mapping[str, Tensor], above: str = "") -> Iterator[str]:
    """The keys that do not lead to the state at a path."""
    if not path:
        yield from (f"{above}{name}" for name in held if name not in state)
        return
    # A key may have dots itself.
    on = next(name for name in held if isinstance(name, str) and (path == name or path.startswith(f"{name}.")))
    yield from (f"{above}{name}" for name in held if name != on)
    yield from _beside(held[on], path[len(on) + 1 :], state, f"{above}{on}.")


def listed(names: Iterable[str], count: int = NAMED) -> str:
    """The first few names, and how many more there are."""
    every = [name if len(name) <= LENGTH else f"{name[:LENGTH]}…" for name in names]
    return ", ".join(every[:count]) + (f" and {len(every) - count} more" if len(every) > count else "")
