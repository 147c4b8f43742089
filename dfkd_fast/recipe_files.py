"""Recipes as they lie on disk: shipped ones, files, and what they extend. Nothing here imports PyTorch."""

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from .errors import DfkdError, unknown
from .renamed import current_keys

__all__ = ["merged", "parse_recipe", "read_recipe", "shipped_recipes"]

SHIPPED = resources.files("dfkd_fast") / "recipes"


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(entry.name.removesuffix(".toml") for entry in SHIPPED.iterdir() if entry.name.endswith(".toml"))


def read_recipe(name_or_path: str) -> dict[str, Any]:
    """The nested tables of a shipped recipe or a TOML file, over those of the recipe that it ``extends``; nothing is checked yet.

    Raises:
        DfkdError: no such recipe, or no TOML.
    """
    return _read(name_or_path, [])


def _read(name_or_path: str, chain: list[str]) -> dict[str, Any]:
    if name_or_path in chain:
        raise DfkdError(f"recipe {name_or_path!r} extends itself: {' → '.join([*chain, name_or_path])}")
    if name_or_path.endswith(".toml"):
        try:
            text = Path(name_or_path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise DfkdError(f"recipe {name_or_path!r} cannot be read: {error}") from error
    elif name_or_path in shipped_recipes():
        text = (SHIPPED / f"{name_or_path}.toml").read_text()
    else:
        raise unknown("recipe", name_or_path, shipped_recipes())
    content = parse_recipe(text, f"recipe {name_or_path!r}")
    content.setdefault("name", Path(name_or_path).stem)
    base = content.pop("extends", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise DfkdError(f"recipe {name_or_path!r}: extends = {base!r}: must be the name or path of a recipe")
    return merged(_read(base, [*chain, name_or_path]), content)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested tables with those of ``changes`` over them."""
    result = dict(base)
    for key, value in changes.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def parse_recipe(text: str, where: str) -> dict[str, Any]:
    """A recipe's nested tables, under their present names, from TOML; ``where`` names it in errors."""
    try:
        content = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise DfkdError(f"{where} is not TOML: {error}") from error
    return current_keys(content, where)
