"""The networks a recipe names."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from dfkd_fast.engine.compatibility import check_networks
from dfkd_fast.errors import DfkdError
from dfkd_fast.models import build_generator, build_model, load_pretrained, load_weights
from dfkd_fast.out_of_memory import memory_for, sizes_of
from dfkd_fast.recipe import Recipe

__all__ = ["NETWORK_SIZES", "build_network", "build_players", "load_given_teacher", "model_of"]

NETWORK_SIZES = (
    *("teacher.model", "student.model", "generator.width", "generator.latent_dim"),
    *("data.image_size", "data.channels", "data.num_classes"),
)
"""What the memory of the networks depends on."""


def model_of(recipe: Recipe, role: str) -> str:
    """The name of the recipe's "teacher" or "student"."""
    return recipe.teacher.model if role == "teacher" else recipe.student.model


def build_network(recipe: Recipe, role: str) -> nn.Module:
    """A freshly initialised teacher or student, the same for the same seed whatever was built before."""
    torch.manual_seed(recipe.seed)
    return build_model(model_of(recipe, role), recipe.data.num_classes, recipe.data.channels)


def build_players(recipe: Recipe, device: torch.device) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The recipe's teacher, student and generator, untrained, that fit each other.

    Raises:
        DfkdError: they do not, or need more memory than there is.
    """
    data = recipe.data
    sizes = sizes_of(recipe, *NETWORK_SIZES)
    with memory_for("the networks", sizes):
        teacher, student = (build_network(recipe, role).to(device) for role in ("teacher", "student"))
        generator = build_generator(
            recipe.generator, data.channels, data.image_size, mean=data.mean, std=data.std, num_classes=data.num_classes
        ).to(device)
        check_networks(teacher, student, generator, device, trained=False, adversarial=recipe.objective.adversarial > 0)
    return teacher, student, generator


def load_given_teacher(recipe: Recipe, teacher: nn.Module, log: Callable[[str], None]) -> None:
    """Load the weights that ``teacher.weights`` names.

    Args:
        recipe: its ``[teacher]`` says which.
        teacher: is given them.
        log: called with a line that says what was taken from the file, unless it is all of it.

    Raises:
        DfkdError: they are not there, of another network, or have another checksum than ``teacher.sha256``.
    """
    wanted = recipe.teacher
    if wanted.weights == "package":
        if wanted.weights_key:
            raise DfkdError(f"teacher.weights_key = {wanted.weights_key!r}: must be empty for teacher.weights = 'package'")
        if wanted.sha256:
            raise DfkdError(f"teacher.sha256 = {wanted.sha256!r}: must be empty for teacher.weights = 'package'")
        load_pretrained(teacher, wanted.model)
        return
    path = Path(wanted.weights).expanduser()
    if wanted.sha256 and path.is_file():
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not found.startswith(wanted.sha256.lower()):
            raise DfkdError(f"teacher.sha256 = {wanted.sha256!r}: the file {path} has {found}")
    load_weights(teacher, path, key=wanted.weights_key, log=log)
