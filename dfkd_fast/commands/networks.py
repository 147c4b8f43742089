"""The networks a recipe names."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dfkd_fast.engine.compatibility import check_classifier
from dfkd_fast.errors import DfkdError
from dfkd_fast.files import expanded
from dfkd_fast.models import build_generator, build_model, load_pretrained, load_weights
from dfkd_fast.out_of_memory import memory_for, sizes_of
from dfkd_fast.recipe import Recipe

__all__ = [
    "NETWORK_SIZES",
    "build_network",
    "build_networks",
    "check_storable",
    "check_teacher",
    "load_given_teacher",
    "model_of",
    "noise_images",
]

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


def build_networks(recipe: Recipe, device: torch.device) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The recipe's teacher, student and generator, untrained.

    Raises:
        OutOfMemoryError: they need more memory than there is.
    """
    data = recipe.data
    sizes = sizes_of(recipe, *NETWORK_SIZES)
    with memory_for("the networks", sizes):
        teacher, student = (build_network(recipe, role).to(device) for role in ("teacher", "student"))
        generator = build_generator(
            recipe.generator, data.channels, data.image_size, mean=data.mean, std=data.std, num_classes=data.num_classes
        ).to(device)
    return teacher, student, generator


def noise_images(recipe: Recipe, count: int, device: torch.device) -> Tensor:
    """Standard normal numbers in the shape of the recipe's images, (count, C, H, W); always the same."""
    shape = count, recipe.data.channels, recipe.data.image_size, recipe.data.image_size
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def check_teacher(recipe: Recipe, teacher: nn.Module, device: torch.device) -> None:
    """Raise a :class:`DfkdError` where a teacher, on the device, does not give as many logits as its data has classes, or not where
    the labels are, if there are any."""
    data = recipe.data
    found = tuple(check_classifier("teacher", teacher, noise_images(recipe, 2, device), "data.image_size's"))
    expected = (data.num_classes, *((data.image_size,) * 2 if data.task == "segmentation" else ()))
    if found[0] != data.num_classes or (data.has_images and found != expected):
        raise DfkdError(
            f"the teacher {recipe.teacher.model} gives {found} logits an image, not {expected}: data.num_classes is {data.num_classes}"
        )


def check_storable(role: str, network: nn.Module) -> None:
    """Raise a :class:`DfkdError` where a network keeps more than tensors, which a file of weights cannot hold."""
    for name, value in network.state_dict().items():
        if not isinstance(value, Tensor):
            raise DfkdError(f"the {role} keeps a {type(value).__name__} as {name} in its state: only tensors can be stored")


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
    path = expanded(wanted.weights)
    if wanted.sha256 and path.is_file():
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not found.startswith(wanted.sha256.lower()):
            raise DfkdError(f"teacher.sha256 = {wanted.sha256!r}: the file {path} has {found}")
    load_weights(teacher, path, key=wanted.weights_key, log=log)
