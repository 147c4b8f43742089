"""Keys that had another name in an earlier version: recipes, checkpoints and weights of that time go on loading."""

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
"""Dotted paths in a recipe, of version 0.1.0, and of now."""


class RenamedKeyWarning(FutureWarning):
    """A key has another name by now; shown once for a key, however many files hold it."""


def current_keys(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A copy of a recipe's nested tables with every key under its present name; warns of each that had an earlier one.

    Args:
        content: of a recipe, or some of its sections.
        where: what it is of, as an error calls it.

    Raises:
        DfkdError: a key stands there under both names.
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
            continue  # what is wrong is the section, and whoever checks the content says so
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
    """The present name of a key, by dotted path; warns where that is another one."""
    if (new := RENAMED.get(path, path)) != path:
        warnings.warn(f"{path} is now called {new}", RenamedKeyWarning, stacklevel=1)  # one place, at which Python shows each text once
    return new


def _copied(tables: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in tables.items()}


def _section(tables: dict[str, Any], path: list[str], *, make: bool) -> dict[str, Any] | None:
    """The table at a path; None where something else is there, or, unless it is to be made, nothing."""
    section: Any = tables
    for name in path:
        section = section.setdefault(name, {}) if make else section.get(name)
        if not isinstance(section, dict):
            return None
    return section
