"""Selects the state dict in a weights file that fits a network, and maps its keys to the network's."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from dfkd_fast.errors import DfkdError

__all__ = ["ENCODERS", "MAX_NAMES", "WRAPPERS", "Selection", "convert", "join_names", "select"]

WRAPPERS = frozenset({"module", "_orig_mod", "model", "net", "network", "student", "teacher", "ema", "ema_model", "model_ema"})
"""Key components with which training code prefixes the state dict of the wrapped network."""
ENCODERS = WRAPPERS | {"features"}
"""The same for encoders; torchvision's mobile networks have their encoder under ``features``."""
TRANSPARENT = frozenset({"module", "_orig_mod"})
"""Key components that DataParallel and torch.compile insert at any depth, since they can wrap submodules."""
BOOKKEEPING = frozenset({"n_averaged", "updates", "total_ops", "total_params"})
"""Buffers that weight averages (AveragedModel, FusedEMA) and profilers (thop) add to a state dict."""
ROOT = "."
"""The key by which a user selects the state dict without a prefix if the file has others as well."""
MAX_DEPTH = 4
"""Levels of nested dictionaries that are searched for state dicts."""
MAX_NAMES = 3
"""Number of names that an error message lists."""
MAX_NAME_LENGTH = 200
"""Number of characters of a name in an error message."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Selection(NamedTuple):
    """A state dict of a file, with the network's keys."""

    label: str
    """Keys and prefix of the state dict in the file, joined by dots; empty if the file is the state dict."""
    tensors: dict[str, Tensor]
    """Tensors by the network's keys."""
    left_out: list[str]
    """Other keys of the file."""
    problems: dict[str, list[str]]
    """Mismatches by kind ("Missing keys", "Unexpected keys", "size mismatch for"); empty if the state dict fits the network."""


def select(
    content: Mapping[Any, Any],
    expected: Mapping[str, Tensor],
    where: str,
    *,
    key: str = "",
    hint: str = "choose by key= or teacher.weights_key",
    wrappers: frozenset[str] = WRAPPERS,
    partial: bool = False,
) -> Selection:
    """Returns the only state dict in a file that fits a network, or the closest one with its mismatches if none fits.

    Args:
        content: the return value of :func:`read_weights`.
        expected: the network's state dict.
        where: prefix of error messages.
        key: selects a state dict if several fit.
        hint: what the user can do if several fit, for the error message.
        wrappers: key components that may be stripped as a prefix, in addition to those of ``key``.
        partial: allow keys that the network does not have.

    Raises:
        DfkdError: the file has no named tensors, nothing under ``key``, or several state dicts that fit.
    """
    strippable = wrappers | set(key.split(".")) if key else wrappers
    candidates: dict[tuple[str, frozenset[str]], Selection] = {}
    for path, state in _state_dicts(content):
        prefixes = _prefixes(state, strippable)
        for prefix in prefixes:
            # Keys with a longer prefix belong to another candidate.
            longer_prefixes = tuple(longer for longer in prefixes if longer != prefix and longer.startswith(prefix))
            names, candidate = _match(content, path, state, prefix, longer_prefixes, expected, partial)
            # Prefixes that select the same tensors are one candidate: the shortest prefix that fits.
            if (path, names) not in candidates or (candidates[path, names].problems and not candidate.problems):
                candidates[path, names] = candidate
    if not candidates:
        keys = join_names(map(repr, content), 2 * MAX_NAMES) or "none"
        raise DfkdError(
            f"{where} contain no state dict (named tensors); a pickled network or training state cannot be loaded; keys: {keys}"
        )
    selected = [
        candidate
        for candidate in candidates.values()
        if not key or f".{key}." in f".{candidate.label}." or (key, candidate.label) == (ROOT, "")
    ]
    fitting = [candidate for candidate in selected if not candidate.problems]
    if not selected:
        labels = join_names((repr(candidate.label) for candidate in candidates.values() if candidate.label), 2 * MAX_NAMES)
        raise DfkdError(f"{where}: the weights key {key!r} is not in the file; available: {labels or 'no keys, only named tensors'}")
    exact = [candidate for candidate in fitting if key and (candidate.label or ROOT) == key]
    if len(fitting) == 1 or exact:
        return (exact or fitting)[0]
    if fitting:
        labels = " and ".join(repr(candidate.label or ROOT) for candidate in fitting)
        raise DfkdError(f"{where} contain several state dicts that fit the network, {labels}: {hint}")
    return min(selected, key=lambda candidate: sum(map(len, candidate.problems.values())))


def convert(where: str, name: str, tensor: Tensor, target: Tensor) -> Tensor:
    """Returns a tensor of a file, converted to the device and dtype of the network's tensor.

    Args:
        where: prefix of error messages.
        name: key of the tensor, for error messages.
        tensor: the tensor in the file.
        target: the network's tensor.

    Raises:
        DfkdError: the tensor is sparse, nested, quantized or on the meta device; it is floating-point and the target is not, or
            the reverse; it has values that are not finite or that the target's integer dtype cannot represent.
    """
    if tensor.is_quantized or tensor.is_meta or tensor.is_nested or tensor.layout != torch.strided:
        kind = "quantized" if tensor.is_quantized else "on the meta device" if tensor.is_meta else "sparse or nested"
        raise DfkdError(f"{where}: {name} is {kind} ({_short(tensor.dtype)}): must be a dense tensor; use dequantize() or to_dense()")
    if _kind(tensor.dtype) != _kind(target.dtype):
        allowed = {"float": "float16, bfloat16, float32 or float64", "integer": "an integer"}.get(_kind(target.dtype), _short(target.dtype))
        raise DfkdError(f"{where}: {name} is {_short(tensor.dtype)}: must be {allowed}")
    value = tensor.detach().to(target.device, target.dtype)
    # Attention masks contain -inf: a non-finite value is allowed where the network has the same one.
    if not (finite := value.isfinite()).all() and (is_lazy(target) or not (finite | (value == target)).all()):
        cause = "NaN or infinite" if not tensor.isfinite().all() else f"infinite in {_short(target.dtype)}"
        raise DfkdError(f"{where}: {name} has {int((~finite).sum())} of {value.numel()} values that are {cause}: must be finite")
    if target.dtype in INTEGERS and not torch.equal(value.long(), tensor.to(target.device).long()):
        raise DfkdError(f"{where}: {name} is {_short(tensor.dtype)} with values that {_short(target.dtype)} cannot represent")
    return value


def _kind(dtype: torch.dtype) -> str:
    """Returns the group of dtypes among which weights are converted; a dtype that is neither float nor integer is its own group."""
    return "float" if dtype in FLOATS else "integer" if dtype in INTEGERS else str(dtype)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _state_dicts(content: Mapping[Any, Any], path: str = "", depth: int = 0) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Yields the nested mappings from names to tensors, with the dotted path of each."""
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if tensors or not (content or path):
        yield path, tensors
    if depth < MAX_DEPTH:
        for name, value in content.items():
            if isinstance(name, str) and isinstance(value, Mapping):
                yield from _state_dicts(value, f"{path}.{name}" if path else name, depth + 1)


def _prefixes(state: Mapping[str, Tensor], strippable: frozenset[str]) -> list[str]:
    """Returns the prefixes of the keys that consist of strippable components only, shortest first; always includes the empty one."""
    prefixes = {""}
    for name in state:
        prefix = ""
        for component in name.split(".")[:-1]:
            if component not in strippable:
                break
            prefix += f"{component}."
            prefixes.add(prefix)
    return sorted(prefixes, key=lambda prefix: (len(prefix), prefix))


def _match(
    content: Mapping[Any, Any],
    path: str,
    state: Mapping[str, Tensor],
    prefix: str,
    longer_prefixes: tuple[str, ...],
    expected: Mapping[str, Tensor],
    partial: bool,
) -> tuple[frozenset[str], Selection]:
    """Matches the keys of a state dict that start with ``prefix`` to a network's; returns the matched keys and the selection."""
    by_unwrapped_name = {_unwrapped(name): name for name in expected}
    if len(by_unwrapped_name) < len(expected):
        by_unwrapped_name = {}  # the wrapper components distinguish keys of this network
    tensors: dict[str, Tensor] = {}
    matched, unexpected, ignored = set(), [], []
    # Exact matches take precedence over matches after unwrapping.
    for name, tensor in sorted(state.items(), key=lambda item: item[0].removeprefix(prefix) not in expected):
        suffix = name.removeprefix(prefix)
        target = suffix if suffix in expected else by_unwrapped_name.get(_unwrapped(suffix))
        last = name.rpartition(".")[2]
        if not name.startswith(prefix):
            ignored.append(last if last in BOOKKEEPING else name.partition(".")[0])
        elif target is not None and target not in tensors:
            tensors[target] = tensor
            matched.add(name)
        elif last in BOOKKEEPING:
            ignored.append(last)
        elif longer_prefixes and name.startswith(longer_prefixes):
            ignored.append(name.partition(".")[0])
        elif partial:
            ignored.append(name)
        else:
            unexpected.append(name)
    # Batch norms had no num_batches_tracked before PyTorch 0.4.1; load_state_dict fills it in.
    missing = [name for name in expected if name not in tensors and not name.endswith("num_batches_tracked")]
    mismatched = [
        f"{name} ({tuple(tensors[name].shape)} in the file, {tuple(target.shape)} in the network)"
        for name, target in expected.items()
        if name in tensors and not is_lazy(target) and not tensors[name].is_nested and tensors[name].shape != target.shape
    ]
    problems = {"Missing keys": missing, "Unexpected keys": unexpected, "size mismatch for": mismatched}
    label = ".".join(filter(None, (path, prefix.removesuffix("."))))
    parent = f"{path}." if path else ""
    left_out = [*_unused_keys(content, path, state), *dict.fromkeys(f"{parent}{name}" for name in ignored)]
    return frozenset(matched), Selection(label, tensors, left_out, {kind: names for kind, names in problems.items() if names})


def _unwrapped(name: str) -> str:
    return ".".join(component for component in name.split(".") if component not in TRANSPARENT)


def _unused_keys(content: Mapping[Any, Any], path: str, state: Mapping[str, Tensor], parent: str = "") -> Iterator[str]:
    """Yields the keys that are not on the path to the state dict at ``path``."""
    if not path:
        yield from (f"{parent}{name}" for name in content if name not in state)
        return
    # A key may itself contain dots.
    key = next(name for name in content if isinstance(name, str) and (path == name or path.startswith(f"{name}.")))
    yield from (f"{parent}{name}" for name in content if name != key)
    yield from _unused_keys(content[key], path[len(key) + 1 :], state, f"{parent}{key}.")


def join_names(names: Iterable[str], count: int = MAX_NAMES) -> str:
    """Returns the first ``count`` names, separated by commas, and the number of the others."""
    shortened = [name if len(name) <= MAX_NAME_LENGTH else f"{name[:MAX_NAME_LENGTH]}…" for name in names]
    return ", ".join(shortened[:count]) + (f" and {len(shortened) - count} more" if len(shortened) > count else "")
