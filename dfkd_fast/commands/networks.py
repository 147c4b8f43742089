"""Builds the networks that a recipe names."""

import hashlib
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_fast.engine.compatibility import check_classifier
from dfkd_fast.errors import DfkdError
from dfkd_fast.models import build_generator, build_model, is_shipped, load_pretrained, load_weights, read_metadata, weights_path
from dfkd_fast.out_of_memory import memory_for, sizes_of
from dfkd_fast.recipe import Recipe
from dfkd_fast.surgery import quantize

__all__ = [
    "NETWORK_SIZES",
    "build_network",
    "build_networks",
    "check_storable",
    "check_teacher",
    "load_given_teacher",
    "model_of",
    "noise_images",
    "note_holdout",
]

NETWORK_SIZES = (
    *("teacher.model", "student.model", "generator.width", "generator.latent_dim"),
    *("data.image_size", "data.channels", "data.num_classes"),
)
"""Settings that the memory of the networks depends on."""


def model_of(recipe: Recipe, role: str) -> str:
    """Returns the model name of the recipe's "teacher" or "student"."""
    return recipe.teacher.model if role == "teacher" else recipe.student.model


def build_network(recipe: Recipe, role: str) -> nn.Module:
    """Returns a newly initialized "teacher" or "student", quantized if the recipe says so; its weights depend on the recipe's seed only."""
    torch.manual_seed(recipe.seed)
    network = build_model(model_of(recipe, role), recipe.data.num_classes, recipe.data.channels)
    if role == "student" and recipe.student.is_quantized:
        config, images = recipe.student, noise_images(recipe, 2, torch.device("cpu"))
        check_classifier("student", network, images, "data.image_size's")
        quantize(
            *(network, images),
            weight_bits=config.weight_bits,
            activation_bits=config.activation_bits,
            end_bits=config.first_last_bits,
        )
    return network


def build_networks(recipe: Recipe, device: torch.device) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Returns the recipe's teacher, student and generator, untrained, on the device.

    Raises:
        OutOfMemoryError: they do not fit in memory.
    """
    data = recipe.data
    sizes = sizes_of(recipe, *NETWORK_SIZES)
    with memory_for("the networks", sizes):
        teacher, student = (build_network(recipe, role).to(device) for role in ("teacher", "student"))
        generator = build_generator(
            recipe.generator, data.channels, recipe.generated_size, mean=data.mean, std=data.std, num_classes=data.num_classes
        ).to(device)
    return teacher, student, generator


def noise_images(recipe: Recipe, count: int, device: torch.device) -> Tensor:
    """Returns standard normal noise in the shape of the recipe's images, (count, C, H, W), with a fixed seed."""
    shape = count, recipe.data.channels, recipe.data.image_size, recipe.data.image_size
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def check_teacher(recipe: Recipe, teacher: nn.Module, device: torch.device) -> None:
    """Check the shape of the teacher's logits.

    Raises:
        DfkdError: it does not return one logit per class, or, with data, not one set of them per label.
    """
    data = recipe.data
    shape = tuple(check_classifier("teacher", teacher, noise_images(recipe, 2, device), "data.image_size's"))
    expected = (data.num_classes, *((data.image_size,) * 2 if data.task == "segmentation" else ()))
    if shape[0] != data.num_classes or (data.has_images and shape != expected):
        raise DfkdError(
            f"the teacher {recipe.teacher.model} returns logits of shape {shape} per image, expected {expected}:"
            f" data.num_classes is {data.num_classes}"
        )


def check_storable(role: str, network: nn.Module) -> None:
    """Raise a :class:`DfkdError` if the network's state dict holds anything but tensors, which a weight file cannot store."""
    for name, value in network.state_dict().items():
        if not isinstance(value, Tensor):
            raise DfkdError(f"the {role}'s state dict holds a {type(value).__name__} as {name}: only tensors can be stored")


def load_given_teacher(recipe: Recipe, teacher: nn.Module, log: Callable[[str], None]) -> None:
    """Load ``teacher.weights`` into the teacher.

    Args:
        recipe: with the section ``[teacher]``.
        teacher: modified in place.
        log: called with a line that says which part of the file was loaded, unless it is all of it, and with one that says that the
            teacher was trained on images of ``data.holdout``.

    Raises:
        DfkdError: the weights do not exist, do not fit the network, or do not match ``teacher.sha256``.
    """
    config = recipe.teacher
    if config.weights == "package":
        if config.weights_key:
            raise DfkdError(f"teacher.weights_key = {config.weights_key!r}: must be empty for teacher.weights = 'package'")
        if config.sha256:
            raise DfkdError(f"teacher.sha256 = {config.sha256!r}: must be empty for teacher.weights = 'package'")
        load_pretrained(teacher, config.model)
        return
    path = weights_path(config.weights)
    if is_shipped(config.weights) and (trained := _teacher_model_of(path)) not in (None, config.model):
        raise DfkdError(f"teacher.model = {config.model!r}: {config.weights} is a {trained}; use --set teacher.model={trained}")
    if config.sha256 and path.is_file():
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not digest.startswith(config.sha256.lower()):
            raise DfkdError(f"teacher.sha256 = {config.sha256!r}: the file {path} has {digest}")
    load_weights(teacher, path, key=config.weights_key, log=log)
    note_holdout(path, "teacher", recipe, log)


def note_holdout(path: Path, role: str, recipe: Recipe, log: Callable[[str], None]) -> None:
    """Log a line if the weights of a file come from a training on images that are held out in a recipe."""
    if (held_out := _holdout_of(path)) is not None and held_out < recipe.data.holdout:
        log(
            f"data.holdout = {recipe.data.holdout}: the {role} {path} was trained with data.holdout = {held_out}, on images that are"
            " held out here: its accuracy on them is too high"
        )


def _holdout_of(weights: Path) -> int | None:
    """Returns ``data.holdout`` of the recipe in the metadata of a weight file; None if it has no recipe that can be read."""
    holdout = _recorded(weights, "data", "holdout", 0)
    return holdout if isinstance(holdout, int) else None


def _teacher_model_of(weights: Path) -> str | None:
    """Returns ``teacher.model`` of the recipe in the metadata of a weight file; None if it has no recipe that can be read."""
    model = _recorded(weights, "teacher", "model", None)
    return model if isinstance(model, str) else None


def _recorded(weights: Path, section: str, key: str, default: Any) -> Any:
    """Returns a value of the recipe in the metadata of a weight file; None if it has no recipe that can be read."""
    try:
        return tomllib.loads(read_metadata(weights)["recipe"]).get(section, {}).get(key, default)
    except (KeyError, ValueError, AttributeError):
        return None
