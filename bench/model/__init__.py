"""A model of the steps on a GPU: which kernels they launch, and how long these take at the rates of the device.

``trace.py`` runs the steps of a recipe on fake tensors and records every operation with the layer that calls it, ``cost.py`` holds the
kernels of an operation with their FLOPs and bytes, ``rates.py`` the rates of the devices, ``rows.py`` the predictions as rows and tables,
and ``plots.py`` plots them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dfkd_fast import load_recipe
from dfkd_fast.errors import DfkdError

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
    "predict_recipe",
    "total_table",
    "write",
    "write_layers",
]


def predict_recipe(name: str, settings: Mapping[str, Any], device: str, command: str) -> list[Row]:
    """Return the predicted kernels of an iteration of a recipe.

    Args:
        name: shipped recipe or TOML file.
        settings: overrides by dotted path.
        device: a key of :data:`DEVICES`.
        command: command line, for the provenance.

    Raises:
        DfkdError: the recipe does not exist, a setting is invalid, or the precision is not bf16, whose rates the model has.
    """
    recipe = load_recipe(name, {"engine.precision": "bf16"} | dict(settings))
    if recipe.engine.precision != "bf16":
        raise DfkdError(f"--set engine.precision={recipe.engine.precision}: must be bf16, whose rates the model has")
    rates = DEVICES[device]
    case = {
        "recipe": recipe.name,
        "settings": ", ".join(f"{path} = {_text(value)}" for path, value in settings.items()),
        "batch_size": recipe.loop.batch_size,
        "precision": recipe.engine.precision,
    }
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
