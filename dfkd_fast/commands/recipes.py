"""``dfkd-fast recipes``. Nothing here imports PyTorch."""

from rich.console import Console

from dfkd_fast.console import print_table
from dfkd_fast.recipe_files import read_recipe, shipped_recipes

__all__ = ["print_recipes"]


def print_recipes(console: Console) -> None:
    """Print a table of the recipes that come with the package."""
    print_table(console, ("recipe", "description"), [(name, read_recipe(name)["description"]) for name in shipped_recipes()])
