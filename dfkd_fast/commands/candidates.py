"""The networks of ``dfkd-fast evaluate``, built and loaded, with the data they are evaluated on."""

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
from dfkd_fast.models import is_user_function, load_pretrained, load_weights, read_metadata, weights_path
from dfkd_fast.models.quantized_files import is_quantized_file
from dfkd_fast.recipe import Recipe, recipe_from_toml
from dfkd_fast.report import RunFolder

from .networks import build_network, load_given_teacher, model_of, noise_images, note_holdout

__all__ = ["Candidate", "EvaluationRequest", "candidates"]


@dataclass(frozen=True)
class EvaluationRequest:
    """Arguments of ``dfkd-fast evaluate``."""

    targets: Sequence[Path]
    """Run folders and weight files."""
    data: str | None = None
    """Data set of image files; overrides the data set of the weights' recipes."""
    models: Sequence[str] = ()
    """Model names: first of the weight files without metadata, in their order, then of networks whose weights a package holds."""
    recipe: Recipe | None = None
    """Recipe with network and data of a weight file without metadata."""
    role: str | None = None
    """Role, "teacher" or "student", of a weight file without metadata."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Overrides by dotted path of the recipe in a file's metadata."""
    precision: PrecisionName = "fp32"
    weights_key: str = ""
    """Key of the weights in files with several state dicts; files of a run have only one."""


@dataclass(frozen=True)
class Candidate:
    """A network to evaluate."""

    name: str
    role: str
    model: str
    data: DataSettings
    network: nn.Module


def candidates(request: EvaluationRequest, log: Callable[[str], None]) -> Iterator[Candidate]:
    """Yields the networks with their weights, under unique names."""
    models = list(request.models)
    names: dict[str, int] = {}
    teachers: set[tuple[str, str, DataSettings]] = set()
    keyed = False

    def unique(name: str) -> str:
        names[name] = names.get(name, 0) + 1
        return name if names[name] == 1 else f"{name} ({names[name]})"

    for path, needs_teacher in _files(request.targets):
        role, recipe, key = _described(path, request, models, log)
        network = build_network(recipe, role)
        load_weights(network, path, key=key, log=log)
        note_holdout(path, role, recipe, log)
        check_classifier(role, network, noise_images(recipe, 2, torch.device("cpu")), "data.image_size's")
        keyed |= key != ""
        yield Candidate(unique(str(path)), role, model_of(recipe, role), recipe.data, network)
        given = recipe.teacher.model if recipe.teacher.weights == "package" else recipe.teacher.weights
        which = given, recipe.teacher.weights_key, recipe.data
        if needs_teacher and which not in teachers and (teacher := _given_teacher(path, recipe, request, log)) is not None:
            teachers.add(which)  # runs with the same teacher share it
            yield Candidate(unique(given), "teacher", recipe.teacher.model, recipe.data, teacher)
    for model in models:
        recipe = _pretrained(model, None, request, log)
        network = build_network(recipe, "student")
        load_pretrained(network, model)
        yield Candidate(unique(model), request.role or "teacher", model, recipe.data, network)
    if not names:
        raise DfkdError("nothing to evaluate: name a run's folder, a file of weights, or --model")
    if request.weights_key and not keyed:
        raise DfkdError(
            f"--weights-key {request.weights_key!r}: weight files of a run hold one state dict only; the key is for files of other programs"
        )


def _files(targets: Sequence[Path]) -> Iterator[tuple[Path, bool]]:
    """Yields weight files, each with whether it is the student of a folder without its teacher."""
    for target in map(weights_path, targets):
        if target.is_dir():
            folder = RunFolder(target)
            files = [file for file in (folder.student, folder.teacher) if file.is_file()]
            if not files:
                raise DfkdError(f"{target} holds neither student.safetensors nor teacher.safetensors")
            yield from ((file, file == folder.student and not folder.teacher.is_file()) for file in files)
        else:
            yield target, False


def _given_teacher(student: Path, recipe: Recipe, request: EvaluationRequest, log: Callable[[str], None]) -> nn.Module | None:
    """Returns the teacher of a run that was given its weights, loaded from the same place; None, with one line, if that fails."""
    try:
        if not recipe.teacher.weights:
            raise DfkdError("the folder holds no teacher.safetensors")
        _confirm_code(student, "teacher", recipe, request, [])  # the name may stand for another file, too
        teacher = build_network(recipe, "teacher")
        load_given_teacher(recipe, teacher, log)
    except DfkdError as error:
        log(f"{student}: is evaluated without its teacher, and no agreement: {error}")
        return None
    return teacher


def _described(path: Path, request: EvaluationRequest, models: list[str], log: Callable[[str], None]) -> tuple[str, Recipe, str]:
    """Returns the role of a weight file, a recipe with its network and data, and the key of its weights."""
    metadata = read_metadata(path)
    if "recipe" in metadata:
        role = metadata.get("role", request.role)
        if role not in ("teacher", "student"):
            problem = f"role {role!r} in the metadata of {path}" if role else f"{path} has a recipe but no role in its metadata"
            raise DfkdError(f"{problem}: must be 'teacher' or 'student'" + ("" if role else "; use --role"))
        recipe = recipe_from_toml(metadata["recipe"], f"recipe in {path}", _data_of(request))
        _confirm_code(path, role, recipe, request, models)
        return role, recipe, ""
    if path.is_file() and is_quantized_file(path):
        raise DfkdError(f"{path} holds the integers of a quantized network: evaluate its run's folder, or rebuild it by quantized.py")
    if models:
        return request.role or "student", _pretrained(models.pop(0), path, request, log), request.weights_key
    if request.recipe is None or request.role is None:
        raise DfkdError(f"{path} has no metadata that names its network: use --model and --data, or --recipe and --role teacher or student")
    return request.role, request.recipe, request.weights_key


def _confirm_code(path: Path, role: str, recipe: Recipe, request: EvaluationRequest, models: list[str]) -> None:
    """Raise a :class:`DfkdError` if a file names code to run that the command line does not name, too."""
    model = model_of(recipe, role)
    if not is_user_function(model):
        return
    # --set replaces the name in the file's own recipe.
    named = [*request.models, request.overrides.get(f"{role}.model")]
    if request.recipe is not None:
        named += [request.recipe.teacher.model, request.recipe.student.model]
    if model not in named:
        raise DfkdError(
            f"{role}.model = {model!r} in the metadata of {path}: code that a file names runs only if the command line names it, too:"
            f" --model {model}, or --recipe FILE"
        )
    if model in models:
        models.remove(model)  # it confirms the file's network, and is not another one to evaluate


def _data_of(request: EvaluationRequest) -> dict[str, Any]:
    return ({"data.name": request.data} if request.data else {}) | request.overrides


def _pretrained(model: str, weights: Path | None, request: EvaluationRequest, log: Callable[[str], None]) -> Recipe:
    """Returns a recipe for a network known by name only, with the input transform it was trained with."""
    root = request.overrides.get("data.root")
    if request.data is None or root is None:
        raise DfkdError(f"--model {model}: requires --data and --data-root, the images to evaluate on")
    transform = resolve_eval_transform(model, weights, log=log)
    classes = DATA_SETS[request.data].classes or list_test_images(request.data, Path(root)).classes
    data = {
        "channels": len(transform.mean),
        "num_classes": classes,
        "image_size": transform.crop,
        "resize": transform.resize,
        "interpolation": transform.interpolation,
        "mean": transform.mean,
        "std": transform.std,
    }
    content = {"name": model, "student": {"model": model}, "data": data}
    return recipe_from_toml(tomli_w.dumps(content), f"--model {model}", _data_of(request))
