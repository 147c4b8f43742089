"""Renamed recipe keys: recipes, checkpoints and weights of earlier versions keep loading."""

import warnings
from collections.abc import Mapping
from typing import Any

from .errors import DfkdError

__all__ = ["RENAMED", "RenamedKeyWarning", "current_keys", "current_keywords", "current_path"]

RENAMED = {
    "loop.precision": "engine.precision",
    "loop.channels_last": "engine.channels_last",
    "loop.fold_teacher": "engine.fold_teacher",
    "loop.sync_batch_norm": "engine.sync_batch_norm",
    "loop.micro_batches": "engine.micro_batches",
    "loop.compile": "engine.compile",
    "loop.capture": "engine.capture",
    "loop.keep_memory": "engine.malloc_reuse",
    "engine.keep_memory": "engine.malloc_reuse",
    "replay.ema_decay": "replay.ema_generator.decay",
}
"""Old and new dotted paths of recipe keys."""


class RenamedKeyWarning(FutureWarning):
    """A key or option was renamed; shown once per name."""


def current_keys(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns a copy of a recipe's nested dictionaries with every renamed key under its new name; warns of each.

    Args:
        content: a recipe, or some of its sections.
        where: name of the recipe in error messages.

    Raises:
        DfkdError: a key is given under both names.
    """
    current = _copied(content)
    for old, new in RENAMED.items():
        *old_sections, old_key = old.split(".")
        *new_sections, new_key = new.split(".")
        section = _section(current, old_sections, make=False)
        if section is None or old_key not in section:
            continue
        target = _section(current, new_sections, make=True)
        if target is None:
            continue  # the section is not a table, which validation reports
        if new_key in target:
            raise DfkdError(f"{where}: {old} is now called {new}, and both are given")
        current_path(old)
        target[new_key] = section.pop(old_key)
    return current


def current_keywords(section: str, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keyword arguments of a settings class under their current names; warns about each former name.

    Args:
        section: Recipe section of the class, such as ``"engine"`` for ``Engine``.
        keywords: Keyword arguments by name.

    Raises:
        TypeError: A key has moved to another section, or is given under both names.
    """
    current = dict(keywords)
    for old in keywords:
        path = f"{section}.{old}"
        if (new := RENAMED.get(path, path)) == path:
            continue
        new_section, _, key = new.rpartition(".")
        if new_section != section:
            raise TypeError(f"unexpected keyword argument {old!r}: {path} is now called {new}; pass it to the class of [{new_section}]")
        if key in keywords:
            raise TypeError(f"unexpected keyword argument {old!r}: {path} is now called {new}, and both are given")
        current[current_path(path).rpartition(".")[2]] = current.pop(old)
    return current


def current_path(path: str) -> str:
    """Returns the new dotted path of a key; warns if the key was renamed."""
    if (new := RENAMED.get(path, path)) != path:
        # With the location of this line, Python shows each text once.
        warnings.warn(f"{path} is now called {new}", RenamedKeyWarning, stacklevel=1)
    return new


def _copied(tables: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in tables.items()}


def _section(tables: dict[str, Any], path: list[str], *, make: bool) -> dict[str, Any] | None:
    """Returns the table at a path, created if ``make``; None if there is none, or another value."""
    section: Any = tables
    for name in path:
        section = section.setdefault(name, {}) if make else section.get(name)
        if not isinstance(section, dict):
            return None
    return section
