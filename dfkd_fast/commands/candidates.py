"""Which networks ``dfkd-fast evaluate`` was asked for: built, with their weights and the data they are tested on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch import nn

from dfkd_fast.choices import PrecisionName
from dfkd_fast.data import DATA_SETS, DataSettings, list_test_images, resolve_eval_transform
from dfkd_fast.engine.compatibility import check_classifier
from dfkd_fast.errors import DfkdError
from dfkd_fast.models import is_user_function, load_pretrained, load_weights, read_metadata
from dfkd_fast.recipe import Recipe, recipe_from_toml
from dfkd_fast.report import RunFolder

from .networks import build_network, model_of, noise_images

__all__ = ["Candidate", "EvaluationRequest", "candidates"]


@dataclass(frozen=True)
class EvaluationRequest:
    """What shall be evaluated, and on what."""

    targets: Sequence[Path]
    """Folders of runs, and files of weights."""
    data: str | None = None
    """A data set of image files, whatever the weights' own recipes name."""
    models: Sequence[str] = ()
    """Names of the networks whose files do not say what they are, in their order; then of networks that bring weights."""
    recipe: Recipe | None = None
    """What says network and data, where the file's header does not."""
    role: str | None = None
    """"teacher" or "student", where the file's header does not say."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Values by dotted path, over the recipe in the header."""
    precision: PrecisionName = "fp32"
    weights_key: str = ""
    """Where in the files the weights are; those that a run left have them in one place only."""


@dataclass(frozen=True)
class Candidate:
    """A network to test."""

    name: str
    role: str
    model: str
    data: DataSettings
    network: nn.Module


def candidates(request: EvaluationRequest, log: Callable[[str], None]) -> Iterator[Candidate]:
    """The networks, with their weights, under names that differ."""
    models = list(request.models)
    names: dict[str, int] = {}
    keyed = False

    def unique(name: str) -> str:
        names[name] = names.get(name, 0) + 1
        return name if names[name] == 1 else f"{name} ({names[name]})"

    for path in _files(request.targets):
        role, recipe, key = _described(path, request, models, log)
        network = build_network(recipe, role)
        load_weights(network, path, key=key, log=log)
        check_classifier(role, network, noise_images(recipe, 2, torch.device("cpu")), "data.image_size's")
        keyed |= key != ""
        yield Candidate(unique(str(path)), role, model_of(recipe, role), recipe.data, network)
    for model in models:
        recipe = _pretrained(model, None, request, log)
        network = build_network(recipe, "student")
        load_pretrained(network, model)
        yield Candidate(unique(model), request.role or "teacher", model, recipe.data, network)
    if not names:
        raise DfkdError("nothing to evaluate: name a run's folder, a file of weights, or --model")
    if request.weights_key and not keyed:
        raise DfkdError(
            f"--weights-key {request.weights_key!r}: needs a file that another program left; what a run leaves has one state only"
        )


def _files(targets: Sequence[Path]) -> Iterator[Path]:
    for target in targets:
        if target.is_dir():
            folder = RunFolder(target)
            found = [file for file in (folder.student, folder.teacher) if file.is_file()]
            if not found:
                raise DfkdError(f"{target} holds neither student.safetensors nor teacher.safetensors")
            yield from found
        else:
            yield target


def _described(path: Path, request: EvaluationRequest, models: list[str], log: Callable[[str], None]) -> tuple[str, Recipe, str]:
    """The role of a file of weights, a recipe that names its network and its data, and the key of its weights."""
    metadata = read_metadata(path)
    if "recipe" in metadata:
        role = metadata.get("role", request.role)
        if role not in ("teacher", "student"):
            there = f"the role {role!r} in the header of {path}" if role else f"{path} has a recipe in its header and no role"
            raise DfkdError(f"{there}: must be 'teacher' or 'student'" + ("" if role else ", as --role says"))
        recipe = recipe_from_toml(metadata["recipe"], f"recipe in {path}", _data_of(request))
        _confirm_code(path, role, recipe, request, models)
        return role, recipe, ""
    if models:
        return request.role or "student", _pretrained(models.pop(0), path, request, log), request.weights_key
    if request.recipe is None or request.role is None:
        raise DfkdError(f"{path} does not say what network it is: give --model and --data, or --recipe and --role teacher or student")
    return request.role, request.recipe, request.weights_key


def _confirm_code(path: Path, role: str, recipe: Recipe, request: EvaluationRequest, models: list[str]) -> None:
    """Raise a :class:`DfkdError` where a file alone names a function to run, and the command line does not."""
    model = model_of(recipe, role)
    if not is_user_function(model):
        return
    # --set replaces the name in the file's own recipe.
    named = [*request.models, request.overrides.get(f"{role}.model")]
    if request.recipe is not None:
        named += [request.recipe.teacher.model, request.recipe.student.model]
    if model not in named:
        raise DfkdError(
            f"{role}.model = {model!r} in the header of {path}: code that a file names is run only if the command line names it, too:"
            f" --model {model}, or --recipe FILE"
        )
    if model in models:
        models.remove(model)  # it confirms, and names no further network


def _data_of(request: EvaluationRequest) -> dict[str, Any]:
    return ({"data.name": request.data} if request.data else {}) | request.overrides


def _pretrained(model: str, weights: Path | None, request: EvaluationRequest, log: Callable[[str], None]) -> Recipe:
    """A recipe for a network that is known by name only, with the images seen as it was trained to."""
    root = request.overrides.get("data.root")
    if request.data is None or root is None:
        raise DfkdError(f"--model {model}: needs --data and --data-root, the images to evaluate it on")
    view = resolve_eval_transform(model, weights, log=log)
    seen = {"image_size": view.crop, "resize": view.resize, "interpolation": view.interpolation, "mean": view.mean, "std": view.std}
    classes = DATA_SETS[request.data].classes or list_test_images(request.data, Path(root)).classes
    content = {"name": model, "student": {"model": model}, "data": {"channels": len(view.mean), "num_classes": classes, **seen}}
    return recipe_from_toml(tomli_w.dumps(content), f"--model {model}", _data_of(request))
