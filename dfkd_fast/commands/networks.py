"""The networks a recipe names."""

import torch
from torch import nn

from dfkd_fast.models import build_classifier
from dfkd_fast.recipe import Recipe

__all__ = ["build_network", "model_of"]


def model_of(recipe: Recipe, role: str) -> str:
    """The name of the recipe's "teacher" or "student"."""
    return recipe.teacher.model if role == "teacher" else recipe.student.model


def build_network(recipe: Recipe, role: str) -> nn.Module:
    """A freshly initialised teacher or student, the same for the same seed whatever was built before."""
    torch.manual_seed(recipe.seed)
    return build_classifier(model_of(recipe, role), recipe.data.num_classes, recipe.data.channels)
