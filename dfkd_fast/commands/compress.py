"""``dfkd-fast compress``: a quantized copy of a network that recovers on generated images, in one command."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dfkd_fast.console import print_line, print_table
from dfkd_fast.data import DATA_SETS, resolve_eval_transform
from dfkd_fast.engine.compatibility import check_classifier
from dfkd_fast.errors import DfkdError, short_repr, unknown
from dfkd_fast.log import LOGGER
from dfkd_fast.models import PRETRAINED, build_model, read_metadata, weights_path
from dfkd_fast.models.weight_files import check_file
from dfkd_fast.recipe import Recipe, load_recipe, recipe_from_toml, recipe_to_dict
from dfkd_fast.recipe_files import flat, read_recipe, shipped_recipes
from dfkd_fast.run import Run
from dfkd_fast.surgery import has_running_statistics

from .distill import distill
from .doctor import check_teacher
from .networks import build_network

__all__ = ["CompressRequest", "compress", "compression_overrides", "parse_bits"]

BASE = "imagenet-lite-w4a8"
"""Recipe with the settings of the method."""
METHOD = ("loop", "engine", "objective", "replay", "update", "student_optimizer", "generator_optimizer", "generator", "report")
"""Its sections that are used for every network."""
DEFAULT_BITS = "w4a8"
DEFAULT_BUDGET = "30min"
IMAGENET_CLASSES = 1000
SMALLEST_FOR_D = 64
"""Image size from which generator D is used; C is for smaller images."""
GENERATED_SIZE = 128
"""Size of generated images for networks with larger inputs."""
LEARNING_RATES = {3: 1e-3, 4: 5e-4, 8: 3e-5}
"""Learning rate of the student by the smaller number of bits of weights and activations. Steps of Adam are as large as the rate, and should
be a part of the step of the rounding."""
BITS = re.compile(r"w(3|4|8|32)(?:a(4|8|32))?")


@dataclass(frozen=True)
class CompressRequest:
    """Arguments of ``dfkd-fast compress``."""

    network: str
    """Model name, or a recipe, whose teacher is compressed."""
    bits: str | None = None
    budget: str | None = None
    data: str | None = None
    """Name of the labelled data set; None for the one of the recipe or weights, or a guess by the number of classes."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Recipe overrides of the other options, by dotted path."""
    resume: bool = False
    """Whether a compression is resumed, which keeps its number of epochs."""


def parse_bits(text: str) -> tuple[int, int]:
    """Returns the bits of weights and activations that a text such as ``w4a8`` names; ``w4`` leaves activations in float.

    Raises:
        DfkdError: the text is of another form, or nothing is quantized.
    """
    matched = BITS.fullmatch(text)
    weights, activations = (int(matched[1]), int(matched[2] or 32)) if matched else (32, 32)
    if weights == activations == 32:
        raise DfkdError(
            f"--bits {short_repr(text)}: must be wXaY, with X = 3, 4, 8 or 32 bits of the weights and Y = 4, 8 or 32 of the activations;"
            " 32 is float, and at most one of them may be 32"
        )
    return weights, activations


def compression_overrides(request: CompressRequest) -> tuple[str, dict[str, Any]]:
    """Returns the recipe of a compression: a recipe's name or file, and overrides of it by dotted path.

    The settings of the method are those of ``imagenet-lite-w4a8``, adapted to the network: no terms for which it has no batch norms or
    no classes per image. Options take precedence.

    Raises:
        DfkdError: the network is unknown or cannot be built, or its weights or data are missing.
    """
    network, options = request.network, dict(request.overrides)
    for path in ("student.weight_bits", "student.activation_bits"):
        if path in options:
            raise DfkdError(f"--set {path}={options[path]}: must be named by --bits wXaY, on which the learning rate depends")
    is_recipe = network.endswith(".toml") or network in shipped_recipes()
    if is_recipe and load_recipe(network).student.is_quantized:  # of an earlier compression, or made for one
        rate = {path: value for path, value in options.items() if path == "student_optimizer.lr"}
        return network, options | _chosen(request, defaults=False) | rate
    of_method = {path: value for path, value in flat(read_recipe(BASE)) if path.partition(".")[0] in METHOD}
    del of_method["loop.epochs"]  # from the budget, or from the options
    of_method |= _chosen(request, defaults=True)
    if is_recipe:
        name, recipe = network, load_recipe(network)
        of_method |= {
            "name": f"{recipe.name}-{request.bits or DEFAULT_BITS}",
            "student.model": options.get("teacher.model", recipe.teacher.model),
            "student.encoder_weights": "",
            **({"data.name": request.data} if request.data else {}),
        }
    else:
        name = BASE
        of_method |= _of_model(request)
    recipe = load_recipe(name, of_method | options)
    return name, of_method | _adapted(recipe) | options


def compress(run: Run) -> dict[str, Any]:
    """Look the network over, distill it into its quantized copy, and write that to the run folder.

    Returns:
        The content of ``summary.json``.

    Raises:
        DfkdError: as :func:`~dfkd_fast.commands.distill.distill`; or the network fails a check of ``dfkd-fast doctor``.
    """
    recipe, folder = run.recipe, run.folder
    if not recipe.student.is_quantized:
        raise DfkdError(f"recipe {recipe.name!r} has no quantized student: set student.weight_bits, or name a network and --bits")
    if recipe.teacher.weights and not run.resumed:
        checks = check_teacher(recipe, run.device)
        print_table(run.console, ("check of the network", "result", "verdict"), checks)
        if wrong := [check.name for check in checks if check.verdict == "wrong"]:
            raise DfkdError(f"the network {recipe.teacher.model} fails checks: {', '.join(wrong)}")
    if not recipe.objective.bn_moments:
        run.note(
            f"{recipe.teacher.model}: images are generated without batch norm statistics, and are worse for it (objective.bn_moments = 0)"
        )
    summary = distill(run)
    print_line(run.console, f"{folder.quantized} holds the quantized network, {folder.rebuild} rebuilds it")
    return summary


def _chosen(request: CompressRequest, *, defaults: bool) -> dict[str, Any]:
    """Returns the overrides of ``--bits`` and ``--budget``, of their defaults if they are not given."""
    bits = request.bits if request.bits is not None else DEFAULT_BITS if defaults else None
    budget = request.budget
    if budget is None and defaults and not request.resume and "loop.epochs" not in request.overrides:
        budget = DEFAULT_BUDGET
    chosen: dict[str, Any] = {}
    if bits is not None:
        weights, activations = parse_bits(bits)
        chosen = {"student.init": "teacher", "student.weight_bits": weights, "student.activation_bits": activations}
        chosen["student_optimizer.lr"] = LEARNING_RATES[min(weights, activations)]
    if budget is not None:
        chosen["loop.budget"] = budget
    return chosen


def _of_model(request: CompressRequest) -> dict[str, Any]:
    """Returns overrides with a network of the catalogue or of the user, its weights and its input."""
    model, options = request.network, request.overrides
    build_model(model, 2, 3)  # raises now if there is no such network
    weights = options.get("teacher.weights") or ("package" if model in PRETRAINED else "")
    if not weights:
        raise DfkdError(f"{model}: name its weights with --weights FILE; nothing is downloaded")
    if weights != "package":
        check_file(weights_path(weights))
    name = f"{re.sub(r'[^0-9A-Za-z_]+', '-', model)}-{request.bits or DEFAULT_BITS}"
    found = {"name": name, "teacher.model": model, "teacher.weights": weights, "student.model": model}
    found["description"] = f"{model} compressed by dfkd-fast compress"
    if recorded := _recorded_data(weights):
        found |= {f"data.{key}": value for key, value in recorded.items()}
    else:
        found |= _data_of_model(model, weights, options)
    data_set = request.data or found["data.name"]
    if data_set not in DATA_SETS:
        raise unknown("data set", data_set, DATA_SETS)
    if DATA_SETS[data_set].needs_root and not options.get("data.root"):
        if request.data:
            raise DfkdError(f"--data {request.data}: requires --data-root")
        data_set = "none"
    found["data.name"] = data_set
    return found


def _recorded_data(weights: str) -> dict[str, Any]:
    """Returns the section ``[data]`` of the recipe in the metadata of a weight file; empty if there is none."""
    path = weights_path(weights)
    if weights == "package" or not path.is_file() or "recipe" not in (metadata := read_metadata(path)):
        return {}
    return dict(recipe_to_dict(recipe_from_toml(metadata["recipe"], f"recipe in {path}"))["data"]) | {"root": ""}


def _data_of_model(model: str, weights: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings of ``[data]`` for a model: those that its library publishes, unless the options name them all."""
    classes = options.get("data.num_classes", IMAGENET_CLASSES)
    data = {"data.num_classes": classes, "data.name": "imagenet" if classes == IMAGENET_CLASSES else "folder", "data.batch_size": 64}
    if all(f"data.{key}" in options for key in ("image_size", "mean", "std")):
        size, mean = options["data.image_size"], options["data.mean"]
        return data | {"data.channels": len(mean) if isinstance(mean, list) else 1, "data.resize": 0, "data.image_size": size}
    transform = resolve_eval_transform(model, None if weights == "package" else Path(weights), log=LOGGER.info)
    return data | {
        "data.channels": len(transform.mean),
        "data.image_size": transform.crop,
        "data.resize": transform.resize,
        "data.interpolation": transform.interpolation,
        "data.mean": list(transform.mean),
        "data.std": list(transform.std),
    }


def _adapted(recipe: Recipe) -> dict[str, Any]:
    """Returns overrides that adapt the method to the recipe's network and images."""
    size, changes = recipe.data.image_size, dict[str, Any]()
    network = build_network(recipe, "teacher")
    changes["generator.model"] = "D" if size >= SMALLEST_FOR_D else "C"
    changes["generator.image_size"] = GENERATED_SIZE if size > GENERATED_SIZE and _accepts(network, recipe, GENERATED_SIZE) else 0
    if recipe.data.task == "segmentation":  # its logits have no class per image
        changes |= {"objective.class_nll": 0.0, "objective.embedding_norm": 0.0, "generator.conditional": False}
    if not any(has_running_statistics(layer) for layer in network.modules()):
        changes["objective.bn_moments"] = 0.0
        if recipe.data.task == "segmentation":
            changes |= {"objective.adversarial": 1.0, "loop.generator_pretraining": 0, "loop.generator_steps": 1}
    return changes


def _accepts(network: nn.Module, recipe: Recipe, size: int) -> bool:
    """Whether a network returns logits for images of a size."""
    try:
        check_classifier("teacher", network, torch.zeros(2, recipe.data.channels, size, size), "smaller")
    except DfkdError:
        return False
    return True
