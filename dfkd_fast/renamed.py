"""Renamed recipe keys: recipes, checkpoints and weights of earlier versions keep loading."""

import warnings
from collections.abc import Mapping
from typing import Any

from .errors import DfkdError, short_repr

__all__ = [
    "FORMER_WEIGHTS",
    "FORMER_WEIGHTS_REPLACED",
    "RENAMED",
    "RenamedKeyWarning",
    "current_keys",
    "current_keywords",
    "current_path",
    "current_weights",
    "warn_of_former_weights",
    "with_current_weights",
    "with_weights_like",
]

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
FORMER_WEIGHTS = ("fresh_weight", "weight")
"""Former keys of ``[replay]``: weights of the discrepancy over fresh and over replayed samples, 1 each by default."""
FORMER_WEIGHTS_REPLACED = "replay.fresh_weight and replay.weight are now replay.share and objective.student_weight"


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


def warn_of_former_weights() -> None:
    """Warns that ``replay.fresh_weight`` and ``replay.weight`` were replaced."""
    warnings.warn(FORMER_WEIGHTS_REPLACED, RenamedKeyWarning, stacklevel=1)


def current_weights(replay_kind: str, update_kind: str, fresh: float, replayed: float) -> tuple[float, float | None]:
    """Returns ``objective.student_weight`` and ``replay.share`` for the former ``replay.fresh_weight`` and ``replay.weight``.

    The share is None if nothing is ever replayed, where it has no effect.

    Raises:
        ValueError: Fresh samples have no weight, or none in floating point beside that of the replayed ones.
    """
    # One discrepancy over all samples: the former weights only decided whether there are replayed ones.
    factor = 1.0 if update_kind == "pooled" else fresh
    if factor == 0 and (replay_kind == "none" or replayed == 0):
        raise ValueError(f"replay.fresh_weight = {fresh!r}: must be above 0, since nothing is replayed")
    if replay_kind == "none":
        return factor, None
    if replayed == 0:
        return factor, 0.0
    total = fresh + replayed
    if (share := replayed / total) >= 1:
        raise ValueError(
            f"replay.fresh_weight = {fresh!r}: with replay.weight = {replayed!r} the student would learn from replayed samples only,"
            " but replay.share must be below 1"
        )
    return 1.0 if update_kind == "pooled" else total, share


def with_weights_like(changes: Mapping[str, Any], base: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns a recipe with its weights of the student's loss under the same keys, former or current, as the changes to it.

    A former weight that the changes leave out keeps the value that it has in the recipe, and so does a current one. Former weights are
    replaced by :class:`~dfkd_fast.engine.Method`, once ``replay.kind`` and ``update.kind`` are known.

    Args:
        changes: Sections of a recipe, not validated.
        base: Recipe to which they are applied; it is not modified.
        where: Name of the changes in error messages.

    Raises:
        DfkdError: The changes have keys of both kinds, or current weights that equal the recipe's former ones do not exist.
    """
    former = [f"replay.{key}" for key in FORMER_WEIGHTS if key in _table(changes, "replay")]
    current = ["replay.share"] if "share" in _table(changes, "replay") else []
    current += ["objective.student_weight"] if "student_weight" in _table(changes, "objective") else []
    if former and current:
        raise DfkdError(f"{where}: {former[0]} is now replay.share and objective.student_weight, and {current[0]} is given as well")
    recipe = _copied(base)
    replay, objective = _table(recipe, "replay"), _table(recipe, "objective")
    has_former = any(key in replay for key in FORMER_WEIGHTS)
    if not (current if has_former else former):
        return recipe
    if not has_former:
        kind = replay.get("kind", "none")
        factor, share = _take_number(objective, "objective.student_weight", 1.0), _take_number(replay, "replay.share", 0.5)
        weights = (factor, 1.0) if kind == "none" else (factor * (1 - share), factor * share)
        recipe["replay"] = replay | dict(zip(FORMER_WEIGHTS, weights, strict=True))
        return recipe
    warn_of_former_weights()
    return with_current_weights(recipe, where)


def with_current_weights(recipe: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns a recipe with its weights of the student's loss under their current keys; unchanged if it has no former ones.

    Args:
        recipe: Sections of a recipe, not validated; it is not modified.
        where: Name of the recipe in error messages.

    Raises:
        DfkdError: There are no current weights that equal the former ones.
    """
    replaced = _copied(recipe)
    replay, objective = _table(replaced, "replay"), _table(replaced, "objective")
    if not any(key in replay for key in FORMER_WEIGHTS):
        return replaced
    fresh, replayed = (_take_number(replay, f"replay.{key}", 1.0) for key in FORMER_WEIGHTS)
    try:
        factor, share = current_weights(replay.get("kind", "none"), _table(replaced, "update").get("kind", "plain"), fresh, replayed)
    except ValueError as error:
        raise DfkdError(f"{where}: {error}") from error
    replaced["objective"] = objective | {"student_weight": factor}
    replaced["replay"] = replay | ({} if share is None else {"share": share})
    return replaced


def _take_number(section: dict[str, Any], path: str, default: float) -> float:
    value = section.pop(path.rpartition(".")[2], default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e38:
        raise DfkdError(f"{path} = {short_repr(value)}: must be a number ≥ 0")
    return float(value)


def _table(tables: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns a section, empty if there is none or another value."""
    section = tables.get(name)
    return section if isinstance(section, dict) else {}


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
