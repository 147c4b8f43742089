"""Reads recipes: shipped ones, TOML files, and the recipes that they extend. Nothing here imports PyTorch."""

import json
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from importlib import resources
from pathlib import Path
from typing import Any

from .errors import DfkdError, short_repr, unknown
from .renamed import current_keys, with_current_weights

__all__ = [
    "BUDGET_RECORD",
    "MOVABLE",
    "changed_from",
    "flat",
    "merged",
    "parse_overrides",
    "parse_recipe",
    "read_levels",
    "read_recipe",
    "shipped_recipes",
    "without_replaced_budget",
]

BUDGET_RECORD = "loop.budget"
"""Key of ``[provenance]`` that says from which budget ``loop.epochs`` was computed."""
SHIPPED = resources.files("dfkd_fast") / "recipes"
MOVABLE = ("description", "provenance", "data.root", "data.workers", "teacher.weights", "teacher.weights_key", "report")
"""Keys and sections without influence on the result: texts, locations, and what is reported. They may change when a run is resumed."""
UNLISTED = (*MOVABLE, "name", "seed")
"""Keys and sections whose differences from a base recipe are not listed in descriptions and provenance."""
LISTED = 3
"""Number of differences that a description lists."""
LONGEST_VALUE = 40
"""Characters of a value in a description."""


def shipped_recipes() -> list[str]:
    """Returns the names of the recipes in the package."""
    return sorted(entry.name.removesuffix(".toml") for entry in SHIPPED.iterdir() if entry.name.endswith(".toml"))


def parse_overrides(changes: Iterable[str]) -> dict[str, Any]:
    """Parse the values of ``--set``, such as ``loop.epochs=3``: TOML, or text if they are not TOML.

    Returns:
        Values by dotted path.

    Raises:
        DfkdError: a change is not one ``key.path=value``.
    """
    overrides: dict[str, Any] = {}
    for change in changes:
        path, equals, text = change.partition("=")
        if not equals or not all(path.split(".")):
            raise DfkdError(f"--set {short_repr(change)}: must be key.path=value, such as loop.epochs=3")
        try:
            read = tomllib.loads(f"value = {text}")
        except RecursionError as error:
            raise DfkdError(f"--set {path}: the value is nested too deeply") from error
        except ValueError:
            read = {"value": text}
        if read.keys() != {"value"}:
            raise DfkdError(f"--set {short_repr(change)}: must be one value; repeat --set for another key")
        overrides[path] = read["value"]
    return overrides


def read_recipe(name_or_path: str) -> dict[str, Any]:
    """Returns the recipes of :func:`read_levels` merged into one."""
    return reduce(merged, read_levels(name_or_path))


def read_levels(name_or_path: str) -> list[dict[str, Any]]:
    """Read a shipped recipe or a TOML file, and the recipes that it ``extends``; values are not validated.

    A path in ``extends`` is relative to the folder of the file.

    Returns:
        Nested dictionaries: the recipe that extends no other, then the changes of each that extends the one before.

    Raises:
        DfkdError: there is no such recipe, it is not TOML, or it extends itself.
    """
    changes: list[dict[str, Any]] = []
    seen: set[str] = set()
    current: str | None = name_or_path
    while current is not None:
        content = parse_recipe(_text(current), f"recipe {current!r}")
        content.setdefault("name", Path(current).stem)
        changes.append(content)
        identity = str(Path(current).resolve()) if current.endswith(".toml") else current
        if identity in seen:
            raise DfkdError(f"recipe {name_or_path!r} extends itself through {current!r}")
        seen.add(identity)
        current = _base(current, content)
    return changes[::-1]


def _text(name_or_path: str) -> str:
    if name_or_path.endswith(".toml"):
        try:
            return Path(name_or_path).read_text("utf-8-sig")
        except (OSError, ValueError) as error:
            raise DfkdError(f"recipe {short_repr(name_or_path)} cannot be read: {error}") from error
    if name_or_path in shipped_recipes():
        return (SHIPPED / f"{name_or_path}.toml").read_text("utf-8")
    if os.path.lexists(name_or_path.partition("\0")[0]) and "/" in name_or_path:
        raise DfkdError(f"recipe {short_repr(name_or_path)}: a recipe's file must end in .toml")
    raise unknown("recipe", name_or_path, shipped_recipes())


def _base(name_or_path: str, content: dict[str, Any]) -> str | None:
    """Remove ``extends`` from a recipe and return it; None if there is none."""
    base = content.pop("extends", None)
    if base is None:
        return None
    if not isinstance(base, str):
        raise DfkdError(f"recipe {name_or_path!r}: extends = {short_repr(base)}: must be the name or path of a recipe")
    return str(Path(name_or_path).parent / base) if base.endswith(".toml") else base


def without_replaced_budget(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Returns a recipe without ``loop.budget``, and without the record of an earlier one, if changes of it set ``loop.epochs`` instead."""
    changed, loop, provenance = changes.get("loop"), base.get("loop"), base.get("provenance")
    if not isinstance(changed, dict) or "epochs" not in changed or changed.get("budget") or not isinstance(loop, dict):
        return base
    if isinstance(provenance, dict) and loop.get("epochs") != changed["epochs"]:
        base = base | {"provenance": {name: text for name, text in provenance.items() if name != BUDGET_RECORD}}
    return base | {"loop": {name: value for name, value in loop.items() if name != "budget"}}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Returns nested dictionaries merged recursively; values of ``changes`` take precedence."""
    result = dict(base)
    for key, value in changes.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def changed_from(base: dict[str, Any], changed: dict[str, Any], defaults: Mapping[str, Any], *, described: bool) -> dict[str, Any]:
    """Returns a recipe that was derived from another, with a provenance that lists what differs, and a description of its own.

    Nothing is listed, and the base's description kept, if only keys differ that are without influence on the result, or name and
    seed. The description is also kept if only ``[engine]`` differs.

    Args:
        base: the recipe that it was derived from, as nested dictionaries.
        changed: the derived recipe, with the provenance of both.
        defaults: value of each key that a recipe does not state, by dotted path.
        described: whether the derived recipe states a description; otherwise it gets one from the differences.
    """
    differences = _differences(base, changed, defaults)
    provenance = changed.get("provenance", {})
    if not differences or not isinstance(provenance, dict):
        return changed
    title = f"changed from {base.get('name')}"
    result = dict(changed)
    # How fast and in which precision something is computed is not what it is.
    if not described and (of_method := [difference for difference in differences if not difference[0].startswith("engine.")]):
        result["description"] = _description(f"{'a changed ' if title in provenance else ''}{base.get('name')}", of_method)
    lines = [f"{key}: {before} → {after}" if before else f"{key} = {after}" for key, before, after in differences]
    earlier = [text for text in [provenance.get(title)] if isinstance(text, str)]
    result["provenance"] = provenance | {title: ", ".join([*earlier, *lines])}
    return result


def flat(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted path and value of every key in nested dictionaries."""
    for key, value in tables.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def _differences(base: dict[str, Any], changed: dict[str, Any], defaults: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns path, old and new value, as TOML, of the keys that differ; the old value is empty if there is neither one nor a default."""
    before, after = (dict(flat(_in_current_keys(recipe))) for recipe in (base, changed))
    found = []
    for key in before | after:
        if any(key == unlisted or key.startswith(f"{unlisted}.") for unlisted in UNLISTED):
            continue
        old, new = (values.get(key, defaults.get(key)) for values in (before, after))
        if not _equal(old, new):
            found.append((key, "" if old is None else _toml(old), _toml(new)))
    return found


def _in_current_keys(recipe: dict[str, Any]) -> dict[str, Any]:
    try:
        return with_current_weights(recipe, "the recipe")
    except DfkdError:  # raised again when the recipe is validated
        return recipe


def _equal(old: Any, new: Any) -> bool:
    numbers = isinstance(old, int | float) and isinstance(new, int | float)
    return old == new if numbers else _toml(old) == _toml(new)


def _toml(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str)  # TOML writes numbers, text and lists the same way
    except ValueError:  # an integer of thousands of digits
        return short_repr(value)


def _description(base: str, differences: list[tuple[str, str, str]]) -> str:
    listed = [f"{key} = {new if len(new) <= LONGEST_VALUE else new[:LONGEST_VALUE] + '…'}" for key, _, new in differences[:LISTED]]
    more = len(differences) - len(listed)
    return f"{base} with {', '.join(listed)}" + (f" and {more} more change{'s' if more > 1 else ''}" if more else "")


def parse_recipe(text: str, where: str) -> dict[str, Any]:
    """Parse TOML into nested dictionaries, with renamed keys under their new names; ``where`` names the recipe in errors."""
    try:
        return current_keys(tomllib.loads(text), where)
    except DfkdError:
        raise
    except RecursionError as error:
        raise DfkdError(f"{where} is nested too deeply") from error
    except ValueError as error:  # not TOML, or an integer of thousands of digits
        raise DfkdError(f"{where} is not TOML: {error}") from error
