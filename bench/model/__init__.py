"""A model of the steps on a GPU: which kernels they launch, and how long these take at the rates of the device.

``trace.py`` runs the steps of a recipe on fake tensors and records every operation with the layer that calls it, ``cost.py`` holds the
kernels of an operation with their FLOPs and bytes, ``rates.py`` the rates of the devices, ``rows.py`` the predictions as rows and tables,
and ``plots.py`` plots them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dfkd_fast import Recipe, load_recipe
from dfkd_fast.errors import DfkdError
from dfkd_fast.recipe import recipe_to_dict
from dfkd_fast.recipe_files import flat, shipped_recipes

from .. import table
from ..provenance import measured_on
from .cost import TENSOR_CORE_KINDS
from .plots import plot
from .rates import DEVICES
from .rows import CASE, Row, kind_table, layer_table, over_layers, predict, total_table
from .trace import trace

__all__ = [
    "CASE",
    "DEVICES",
    "TENSOR_CORE_KINDS",
    "Row",
    "kind_table",
    "layer_table",
    "load",
    "predict_recipe",
    "total_table",
    "write",
    "write_layers",
]


def load(name: str, settings: Mapping[str, Any]) -> tuple[Recipe, dict[str, str]]:
    """Return a recipe, and the columns of its rows that identify it.

    Args:
        name: shipped recipe or TOML file.
        settings: overrides by dotted path.

    Raises:
        DfkdError: the recipe does not exist or a setting is invalid, or the model does not know its kernels: in another precision than
            bf16, or compiled.
    """
    recipe, original = load_recipe(name, settings), dict(flat(recipe_to_dict(load_recipe(name))))
    if recipe.engine.precision not in ("auto", "bf16"):
        raise DfkdError(f"engine.precision = {recipe.engine.precision!r}: must be 'auto' or 'bf16', whose rates the model has")
    if recipe.engine.compile:
        value = _text(recipe.engine.compile)
        raise DfkdError(f"engine.compile = {value}: the model does not know which kernels torch.compile makes")
    changed = {path: value for path, value in sorted(settings.items()) if original.get(path) != value}
    columns = {
        "recipe": name if name in shipped_recipes() else str(Path(name).resolve()),
        "settings": ", ".join(f"{path} = {_text(value)}" for path, value in changed.items()),
    }
    return load_recipe(name, {**settings, "engine.precision": "bf16"}), columns


def predict_recipe(name: str, settings: Mapping[str, Any], device: str, command: str) -> list[Row]:
    """Return the predicted kernels of an iteration of a recipe.

    Args:
        name: shipped recipe or TOML file.
        settings: overrides by dotted path.
        device: a key of :data:`DEVICES`.
        command: command line, for the provenance.

    Raises:
        DfkdError: see :func:`load`.
    """
    recipe, columns = load(name, settings)
    rates = DEVICES[device]
    case = {**columns, "batch_size": recipe.loop.batch_size, "precision": recipe.engine.precision}
    return predict(trace(recipe), rates, case, measured_on(f"{rates.name} (model)", command))


def write(path: Path, rows: list[Row]) -> Path:
    """Add rows, summed over layers, to a CSV in place of those of the same case, and plot the CSV; return the path of the plot."""
    table.replace(path, table.names(Row), list(map(table.cells, over_layers(rows))), CASE)
    picture = path.with_suffix(".png")
    plot(table.read(path), picture)
    return picture


def write_layers(path: Path, rows: list[Row]) -> None:
    """Write a CSV with the rows of every layer."""
    table.write_anew(path, rows)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
