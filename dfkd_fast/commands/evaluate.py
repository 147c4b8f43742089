"""Evaluating weights on labelled images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from dfkd_fast import distributed
from dfkd_fast.data import CLASSES, DataSettings, evaluation_batches, label_names, read_listing, view_of
from dfkd_fast.engine.precision import Precision, PrecisionName
from dfkd_fast.errors import DfkdError
from dfkd_fast.evaluation import Evaluation, Figures, SegmentationFigures, evaluate, evaluate_segmentation
from dfkd_fast.models import load_pretrained, load_weights, names_code, read_metadata
from dfkd_fast.recipe import Recipe, recipe_from_toml
from dfkd_fast.report import RunFolder

from .networks import build_network, model_of

__all__ = [
    "Evaluated",
    "EvaluatedClassifier",
    "EvaluatedSegmenter",
    "Evaluator",
    "Wanted",
    "evaluate_weights",
]

NAMED = 5
"""Unreadable files that an error names."""


@dataclass(frozen=True)
class Wanted:
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
class Evaluated:
    """What one file of weights is worth."""

    weights: str
    role: str
    model: str
    count: int
    """Images it was tested on."""
    images_per_second: float
    """Of the pass that it shared with the networks that see images as it does."""
    seconds: dict[str, float]
    """Of that pass: ``total``, ``decode``, ``network``."""
    agreement: dict[str, Any] | None
    """With the first teacher, or the first network: ``reference``, ``top1`` in percent, ``mean_kl`` in nats."""
    unreadable: list[str]
    """Files left out, and why."""


@dataclass(frozen=True)
class EvaluatedClassifier(Evaluated):
    """The same of a classifier, in percent."""

    top1: float
    top5: float


@dataclass(frozen=True)
class EvaluatedSegmenter(Evaluated):
    """The same of a segmenter, in percent."""

    miou: float
    pixel_accuracy: float
    iou: dict[str, float | None]
    """By class, None of one that occurs nowhere."""


@dataclass(frozen=True)
class _Candidate:
    name: str
    role: str
    model: str
    data: DataSettings
    network: nn.Module


def evaluate_weights(wanted: Wanted, device: torch.device, console: Console) -> list[Evaluated]:
    """Test networks; those that see the same images share one pass over them.

    Raises:
        DfkdError: nothing to evaluate, nothing that says what network it is or where images are, or images that cannot be
            decoded.
    """

    def say(remark: str) -> None:
        console.print(remark, highlight=False, markup=False, soft_wrap=True)

    candidates = list(_candidates(wanted, say))
    passes: dict[DataSettings, list[_Candidate]] = {}
    for candidate in candidates:
        passes.setdefault(candidate.data, []).append(candidate)
    if len(passes) > 1:
        say("these networks see images in different ways: a pass each, and no agreement between them")
    found: dict[str, Evaluated] = {}
    for data, together in passes.items():
        found |= _one_pass(data, together, wanted.precision, device, console, say)
    return [found[candidate.name] for candidate in candidates]


class Evaluator:
    """What a training calls for a network's accuracy, or mIoU, in percent.

    Args:
        data: what it is tested on.
        device: where networks are.
        say: told, in a line each, what a reader of the figures must know.

    Raises:
        DfkdError: files that cannot be decoded, where that is an error and already known.
    """

    def __init__(self, data: DataSettings, device: torch.device, say: Callable[[str], None] = lambda remark: None) -> None:
        self.data = data
        self.device = device
        self.batches = evaluation_batches(data, device, rank=distributed.rank(), world_size=distributed.world_size(), say=say)
        # Images with a label a pixel are read by now; others tell in the pass.
        bad = distributed.gathered(list(self.batches.unreadable))
        _check_readable(bad, int(distributed.summed(torch.tensor(self.batches.count))) - len(bad), data)

    def __call__(self, network: nn.Module) -> float:
        """Test a network on all images."""
        if self.data.task == "segmentation":
            return self._segmented({"network": network}).networks["network"].miou
        found = evaluate({"network": network}, self.batches, self.device)
        _check_readable(found.unreadable, found.count, self.data)
        return found.networks["network"].top1

    def iou(self, networks: Mapping[str, nn.Module]) -> dict[str, dict[str, float | None]]:
        """IoU in percent by network and class, None of a class that occurs nowhere; nothing for classifiers."""
        if self.data.task != "segmentation":
            return {}
        return {name: named_iou(self.data, found) for name, found in self._segmented(networks).networks.items()}

    def _segmented(self, networks: Mapping[str, nn.Module]) -> Evaluation[SegmentationFigures]:
        return evaluate_segmentation(networks, self.batches, self.device, num_classes=self.data.num_classes)


def named_iou(data: DataSettings, figures: SegmentationFigures) -> dict[str, float | None]:
    """A network's IoU in percent by the names of the data set's classes."""
    return dict(zip(label_names(data), figures.iou, strict=True))


def _one_pass(
    data: DataSettings,
    candidates: Sequence[_Candidate],
    precision: PrecisionName,
    device: torch.device,
    console: Console,
    say: Callable[[str], None],
) -> dict[str, Evaluated]:
    networks = {one.name: one.network.to(device, memory_format=torch.channels_last) for one in candidates}  # type: ignore[call-overload]
    lowered = Precision(precision, device)
    for network in networks.values():
        lowered.keep_logits(network, torch.zeros(1, data.channels, data.image_size, data.image_size, device=device))
    reference = next((one.name for one in candidates if one.role == "teacher"), candidates[0].name)
    images = torch.float16 if precision == "fp16" else torch.float32
    batches = evaluation_batches(data, device, images, rank=distributed.rank(), world_size=distributed.world_size(), say=say)
    with Progress(console=console, transient=True, disable=not console.is_terminal or console.quiet) as progress:
        bar = progress.add_task("images", total=batches.count)
        options: dict[str, Any] = {
            "reference": reference,
            "autocast": lowered.autocast,
            "on_batch": lambda count: progress.advance(bar, count),
        }
        done: Evaluation[Figures] | Evaluation[SegmentationFigures]
        if data.task == "segmentation":
            done = evaluate_segmentation(networks, batches, device, num_classes=data.num_classes, **options)
        else:
            done = evaluate(networks, batches, device, **options)
    _check_readable(done.unreadable, done.count, data)
    agreements = {one.network: {name: value for name, value in asdict(one).items() if name != "network"} for one in done.agreements}

    def described(one: _Candidate, figures: Figures | SegmentationFigures) -> Evaluated:
        common: dict[str, Any] = {
            "weights": one.name,
            "role": one.role,
            "model": one.model,
            "count": done.count,
            "images_per_second": done.images_per_second,
            "seconds": done.seconds,
            "agreement": agreements.get(one.name),
            "unreadable": done.unreadable,
        }
        if isinstance(figures, SegmentationFigures):
            iou = named_iou(data, figures)
            return EvaluatedSegmenter(**common, miou=figures.miou, pixel_accuracy=figures.pixel_accuracy, iou=iou)
        return EvaluatedClassifier(**common, top1=figures.top1, top5=figures.top5)

    return {one.name: described(one, done.networks[one.name]) for one in candidates}


def _check_readable(bad: Sequence[str], count: int, data: DataSettings) -> None:
    """Raise a :class:`DfkdError` for files that could not be decoded, beside so many that could, where that is an error."""
    if bad and data.strict:
        named = ", ".join(bad[:NAMED]) + (f" and {len(bad) - NAMED} more" if len(bad) > NAMED else "")
        raise DfkdError(
            f"{len(bad)} of {count + len(bad)} images cannot be decoded: {named}; data.strict = false (--no-strict) leaves them out"
        )


def _candidates(wanted: Wanted, say: Callable[[str], None]) -> Iterator[_Candidate]:
    """The networks, with their weights, under names that differ."""
    models = list(wanted.models)
    names: dict[str, int] = {}
    keyed = False

    def unique(name: str) -> str:
        names[name] = names.get(name, 0) + 1
        return name if names[name] == 1 else f"{name} ({names[name]})"

    for path in _files(wanted.targets):
        role, recipe, key = _described(path, wanted, models, say)
        network = build_network(recipe, role)
        load_weights(network, path, key=key, log=say)
        keyed |= key != ""
        yield _Candidate(unique(str(path)), role, model_of(recipe, role), recipe.data, network)
    for model in models:
        recipe = _pretrained(model, None, wanted, say)
        network = build_network(recipe, "student")
        load_pretrained(network, model)
        yield _Candidate(unique(model), wanted.role or "teacher", model, recipe.data, network)
    if not names:
        raise DfkdError("nothing to evaluate: name a run's folder, a file of weights, or --model")
    if wanted.weights_key and not keyed:
        raise DfkdError(
            f"--weights-key {wanted.weights_key!r}: needs a file that another program left; what a run leaves has one state only"
        )


def _files(targets: Sequence[Path]) -> Iterator[Path]:
    for target in targets:
        if target.is_dir():
            folder = RunFolder(target)
            found = [file for file in (folder.student, folder.teacher) if file.is_file()]
            if not found:
                raise DfkdError(f"{target} holds neither student.safetensors nor teacher.safetensors")
            yield from found
        elif target.is_file():
            yield target
        else:
            raise DfkdError(f"weights {target} not found")


def _described(path: Path, wanted: Wanted, models: list[str], say: Callable[[str], None]) -> tuple[str, Recipe, str]:
    """The role of a file of weights, a recipe that names its network and its data, and the key of its weights."""
    metadata = read_metadata(path)
    if "recipe" in metadata:
        role = metadata.get("role", wanted.role)
        if role not in ("teacher", "student"):
            there = f"the role {role!r} in the header of {path}" if role else f"{path} has a recipe in its header and no role"
            raise DfkdError(f"{there}: must be 'teacher' or 'student'" + ("" if role else ", as --role says"))
        recipe = recipe_from_toml(metadata["recipe"], f"recipe in {path}", _data_of(wanted))
        _confirm_code(path, role, recipe, wanted, models)
        return role, recipe, ""
    if models:
        return wanted.role or "student", _pretrained(models.pop(0), path, wanted, say), wanted.weights_key
    if wanted.recipe is None or wanted.role is None:
        raise DfkdError(f"{path} does not say what network it is: give --model and --data, or --recipe and --role teacher or student")
    return wanted.role, wanted.recipe, wanted.weights_key


def _confirm_code(path: Path, role: str, recipe: Recipe, wanted: Wanted, models: list[str]) -> None:
    """Raise a :class:`DfkdError` where a file alone names a function to run, and the command line does not."""
    model = model_of(recipe, role)
    if not names_code(model):
        return
    # --set replaces the name in the file's own recipe.
    named = [*wanted.models, wanted.overrides.get(f"{role}.model")]
    if wanted.recipe is not None:
        named += [wanted.recipe.teacher.model, wanted.recipe.student.model]
    if model not in named:
        raise DfkdError(
            f"{role}.model = {model!r} in the header of {path}: code that a file names is run only if the command line names it, too:"
            f" --model {model}, or --recipe FILE"
        )
    if model in models:
        models.remove(model)  # it confirms, and names no further network


def _data_of(wanted: Wanted) -> dict[str, Any]:
    return ({"data.name": wanted.data} if wanted.data else {}) | wanted.overrides


def _pretrained(model: str, weights: Path | None, wanted: Wanted, say: Callable[[str], None]) -> Recipe:
    """A recipe for a network that is known by name only, with the images seen as it was trained to."""
    root = wanted.overrides.get("data.root")
    if wanted.data is None or root is None:
        raise DfkdError(f"--model {model}: needs --data and --data-root, the images to evaluate it on")
    view = view_of(model, weights, say=say)
    seen = {"image_size": view.crop, "resize": view.resize, "interpolation": view.interpolation, "mean": view.mean, "std": view.std}
    classes = CLASSES.get(wanted.data) or read_listing(wanted.data, Path(root)).classes
    content = {"name": model, "student": {"model": model}, "data": {"channels": len(view.mean), "num_classes": classes, **seen}}
    return recipe_from_toml(tomli_w.dumps(content), f"--model {model}", _data_of(wanted))
