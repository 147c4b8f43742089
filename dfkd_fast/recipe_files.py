"""Reads recipes: shipped ones, TOML files, and the recipes that they extend. Nothing here imports PyTorch."""

import os
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from .errors import DfkdError, short_repr, unknown
from .renamed import current_keys

__all__ = ["BUDGET_RECORD", "merged", "parse_recipe", "read_recipe", "shipped_recipes", "without_budget"]

BUDGET_RECORD = "loop.budget"
"""Key of ``[provenance]`` that says from which budget ``loop.epochs`` was computed."""
SHIPPED = resources.files("dfkd_fast") / "recipes"


def shipped_recipes() -> list[str]:
    """Returns the names of the recipes in the package."""
    return sorted(entry.name.removesuffix(".toml") for entry in SHIPPED.iterdir() if entry.name.endswith(".toml"))


def read_recipe(name_or_path: str) -> dict[str, Any]:
    """Read a shipped recipe or a TOML file, merged over the recipe that it ``extends``; values are not validated.

    A path in ``extends`` is relative to the folder of the file.

    Returns:
        Nested dictionaries.

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
    recipe = changes.pop()
    while changes:
        changed = changes.pop()
        loop = changed.get("loop")
        if isinstance(loop, dict) and "epochs" in loop and "budget" not in loop:
            recipe = without_budget(recipe, loop["epochs"])
        recipe = merged(recipe, changed)
    return recipe


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


def without_budget(recipe: dict[str, Any], epochs: Any) -> dict[str, Any]:
    """Returns a recipe whose ``loop.budget`` is replaced by a number of epochs, without the record of another number's budget."""
    loop, provenance = recipe.get("loop"), recipe.get("provenance")
    if isinstance(provenance, dict) and not (isinstance(loop, dict) and loop.get("epochs") == epochs):
        recipe = recipe | {"provenance": {name: text for name, text in provenance.items() if name != BUDGET_RECORD}}
    return recipe | {"loop": loop | {"budget": ""}} if isinstance(loop, dict) else recipe


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Returns nested dictionaries merged recursively; values of ``changes`` take precedence."""
    result = dict(base)
    for key, value in changes.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


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
