"""Teachers whose weights are part of this package, so that a recipe with one needs neither data nor a download."""

from pathlib import Path

from dfkd_fast.errors import unknown
from dfkd_fast.files import expanded

__all__ = ["SHIPPED", "is_shipped", "shipped_teachers", "weights_path"]

SHIPPED = "shipped:"
"""Prefix of ``teacher.weights`` for the name of a shipped teacher."""
FOLDER = Path(__file__).parents[1] / "teachers"
"""Holds ``NAME.safetensors``, with recipe, accuracy and license in its metadata, and the log ``NAME.jsonl`` for each teacher."""


def shipped_teachers() -> list[str]:
    """Returns the names of the shipped teachers."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def is_shipped(weights: str) -> bool:
    """Whether weights are those of a shipped teacher, such as ``shipped:mnist-lenet5``."""
    return weights.startswith(SHIPPED)


def weights_path(weights: str | Path) -> Path:
    """Returns the file of a path or of a shipped teacher, such as ``shipped:mnist-lenet5``.

    Raises:
        DfkdError: there is no such shipped teacher.
    """
    if not is_shipped(str(weights)):
        return expanded(weights)
    name = str(weights).removeprefix(SHIPPED)
    if name not in shipped_teachers():
        raise unknown("shipped teacher", name, shipped_teachers())
    return FOLDER / f"{name}.safetensors"
