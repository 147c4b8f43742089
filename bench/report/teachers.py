"""The table of the teachers that ship with the package, from the metadata of their files."""

from dfkd_fast.models import read_metadata, shipped_teachers, weights_path
from dfkd_fast.recipe import recipe_from_toml

from .markdown import code, marker, table

__all__ = ["TEACHERS", "teacher_table"]

TEACHERS = marker("shipped teachers", "dfkd_fast/teachers")


def teacher_table() -> str:
    """One row for each teacher."""
    rows = []
    for name in shipped_teachers():
        path = weights_path(f"shipped:{name}")
        metadata = read_metadata(path)
        recipe = recipe_from_toml(metadata["recipe"], f"recipe in {path}")
        rows.append(
            (
                code(f"shipped:{name}"),
                code(recipe.teacher.model),
                f"{metadata['accuracy']} %",
                f"{recipe.teacher.epochs} epochs, {float(metadata['seconds']) / 60:.1f} min",
                f"{path.stat().st_size / 1e6:.2f} MB",
                metadata["data"],
                code(f"dfkd-fast teach {recipe.name} --data-root DIR"),
                metadata["commit"],
            )
        )
    return table(
        ("weights", "network", "test accuracy", "training, two CPU cores", "size", "training data", "to train it again", "commit"), rows
    )
