"""Recipes: every setting of a run, typed and validated."""

import copy
import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import field
from functools import cache, reduce
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from dfkd_fast.data import Augment, DataSettings
from dfkd_fast.engine import Method, Optimizer
from dfkd_fast.errors import DfkdError, short_repr, unknown
from dfkd_fast.methods import Replay
from dfkd_fast.models import GeneratorSettings
from dfkd_fast.recipe_files import changed_from, flat, merged, parse_recipe, read_levels, without_replaced_budget
from dfkd_fast.renamed import current_keys, current_path, with_weights_like
from dfkd_fast.settings import BelowOne, Count, FileName, NonNegative, PositiveInt, Seed, settings
from dfkd_fast.surgery import FLOAT

__all__ = [
    "Recipe",
    "Report",
    "Student",
    "Teacher",
    "load_recipe",
    "recipe_from_toml",
    "recipe_to_dict",
    "recipe_to_toml",
]


@settings
class Teacher:
    """Recipe section ``[teacher]``: the network, its weights, or how to train it without any."""

    model: str = "lenet5"
    weights: str = ""
    """A safetensors or PyTorch file, ``shipped:NAME`` for a teacher of this package, or ``package`` for weights of another Python package
    (efficientnet_lite0); empty to train the teacher."""
    sha256: str = ""
    """Expected SHA-256 of the weight file, or a prefix of it; empty for no check."""
    weights_key: str = ""
    """Key of the weights in a file with several state dicts, such as ``model_ema`` or ``state_dict.teacher``; empty if only one fits."""
    encoder_weights: str = ""
    """Initial encoder weights of a segmenter: the weight file of a classifier, or ``efficientnet_lite0``; empty for random ones."""
    epochs: PositiveInt = 10
    batch_size: PositiveInt = 256
    augment: Augment = "none"
    """Augmentation of the training images: shifts by up to 4 pixels (image folders above 64 pixels: random resized crops;
    segmentation: random crops), with black borders or, for ``reflect`` and ``reflect_flip``, reflected ones, and horizontal flips.
    With reflected borders, the statistics of batch norms are those of the data, which ``objective.bn_moments`` reproduces."""
    focal_gamma: NonNegative = 0.0
    """γ of the focal loss; 0 is the cross-entropy."""
    ema_decay: BelowOne = 0.0
    """Decay of the exponential moving average of the weights, which becomes the teacher; 0 disables it."""
    evaluate_every: Count = 0
    """Number of epochs between evaluations in the training; 0 for none. The trained teacher is always evaluated."""


@settings
class Student:
    """Recipe section ``[student]``: the network, its initial weights, and their bits."""

    model: str = "lenet5_half"
    init: Literal["random", "teacher"] = "random"
    """Initial weights; ``teacher`` for those of the teacher, whose model must then be ``model``."""
    encoder_weights: str = ""
    """Initial encoder weights of a segmenter, as in ``[teacher]``, or ``teacher`` for those of the teacher's encoder."""
    weight_bits: Literal[3, 4, 8, 32] = 32
    """Bits of the weights of convolutions and linear layers, see :func:`~dfkd_fast.surgery.quantize`; 32 is float. Fewer require
    ``init = "teacher"``."""
    activation_bits: Literal[4, 8, 32] = 32
    """Bits of the inputs of these layers, likewise."""
    first_last_bits: Literal[3, 4, 8] = 8
    """Bits of the first and the last of these layers, for weights and inputs that are quantized."""

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits"):
            if getattr(self, name) != FLOAT and self.init != "teacher":
                raise ValueError(f"{name} = {getattr(self, name)}: requires init = 'teacher', not {self.init!r}")
        if self.init == "teacher" and self.encoder_weights:
            raise ValueError(f"encoder_weights = {self.encoder_weights!r}: must be empty for init = 'teacher'")

    @property
    def is_quantized(self) -> bool:
        """Whether weights or activations have less than 32 bits."""
        return min(self.weight_bits, self.activation_bits) < FLOAT


@settings
class Report:
    """Recipe section ``[report]``: checkpoints and samples that a run writes."""

    checkpoint_every: PositiveInt = 1
    """Epochs between checkpoints."""
    samples_every: PositiveInt = 5
    """Epochs between grids of generated samples; the first and the last epoch always have one."""
    samples: Annotated[int, Field(strict=True, ge=1, le=10_000)] = 64
    """Samples per grid."""
    retained_within: NonNegative = 5.0
    """An epoch counts as retained if its accuracy is at most this many points below the teacher's."""


@settings
class Recipe(Method):
    """Every setting of a run: the sections of :class:`Method`, which a :class:`~dfkd_fast.Trainer` reads, and those of data, networks
    and reports."""

    name: FileName
    """Also the default name of the run folder."""
    description: str = ""
    seed: Seed = 0
    data: DataSettings = field(default_factory=DataSettings)
    teacher: Teacher = field(default_factory=Teacher)
    teacher_optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=0.01, weight_decay=1e-4))
    student: Student = field(default_factory=Student)
    generator: GeneratorSettings = field(default_factory=GeneratorSettings)
    report: Report = field(default_factory=Report)
    provenance: dict[str, str] = field(default_factory=dict)
    """Source of the settings: which value is from a paper, and which is ours; and which differ from the recipe that this one was
    derived from."""

    @property
    def generated_size(self) -> int:
        """Height and width of the generated images, in pixels."""
        return self.generator.image_size or self.data.image_size

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.student.init == "teacher" and self.student.model != self.teacher.model:
            raise ValueError(
                f"student.model = {self.student.model!r}: must be {self.teacher.model!r}, the teacher's, for student.init = 'teacher'"
            )


CHECKED = TypeAdapter(Recipe)
SURROGATE = re.compile("[\ud800-\udfff]")
"""Python's stand-ins for bytes that are not UTF-8."""


def load_recipe(name_or_path: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Load a shipped recipe or a TOML file.

    A file may begin with ``extends = "NAME"`` and then states only the differences from that recipe. The path of a file there
    is relative to the folder of the file that extends it. Its provenance then lists the differences, as it does for overrides;
    without a description of its own it gets one that names them.

    Args:
        name_or_path: a name such as ``digits``, or a path that ends in ``.toml``.
        overrides: values by dotted path, such as ``{"loop.epochs": 3}``.

    Returns:
        The recipe with every value resolved. It is a :class:`Method`, so a :class:`~dfkd_fast.Trainer` takes it.

    Raises:
        DfkdError: there is no such recipe, or a key or value is not allowed; one line with field, value and what is allowed.
    """
    return _checked(read_levels(name_or_path), overrides, f"recipe {name_or_path!r}")


def recipe_from_toml(text: str, where: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Parse a recipe from TOML text, as the metadata of a weight file holds it; ``where`` names it in errors."""
    return _checked([parse_recipe(text, where)], overrides, where)


def recipe_to_toml(recipe: Recipe) -> str:
    """Returns the complete recipe as TOML, from which :func:`recipe_from_toml` gives an equal recipe."""
    return tomli_w.dumps(recipe_to_dict(recipe))


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Returns the complete recipe as nested dictionaries."""
    return CHECKED.dump_python(recipe)


def _with(content: dict[str, Any], overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    overrides = overrides or {}
    if "loop.epochs" in overrides:
        if budget := overrides.get("loop.budget"):
            raise DfkdError(f"loop.budget = {short_repr(budget)}: loop.epochs follows from it, and both are given; choose one")
        content = without_replaced_budget(content, {"loop": {"epochs": overrides["loop.epochs"]}})
    for path, value in overrides.items():
        path = current_path(path)
        *sections, key = path.split(".")
        if isinstance(value, Mapping):
            moved = current_keys(_nested(path, value), path)
            value = _take(moved, path)
            content = merged(content, moved)  # renamed keys may belong to another section
        section = content
        for name in sections:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise DfkdError(f"{path}: {name} is not a section of a recipe")
        section[key] = value
    return content


def _nested(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return dict(value)


def _take(tables: dict[str, Any], path: str) -> Any:
    """Remove and return the value at a path."""
    *sections, key = path.split(".")
    for name in sections:
        tables = tables[name]
    return tables.pop(key)


def _checked(levels: list[dict[str, Any]], overrides: Mapping[str, Any] | None, where: str) -> Recipe:
    """Returns the recipe that results from the first level, the changes of the others, and the overrides."""
    try:
        content, *extending = levels
        with_weights_like(content, {}, where)  # refuses weights under former and current keys
        for changes in extending:
            content = with_weights_like(changes, content, f"recipe {changes['name']!r}")
            content = changed_from(
                content, merged(without_replaced_budget(content, changes), changes), _defaults(), described="description" in changes
            )
        if overrides:
            overriding = reduce(merged, [_nested(path, value) for path, value in overrides.items()])
            content = with_weights_like(overriding, content, where)
            changed = _with(copy.deepcopy(content), overrides)
            content = changed_from(content, changed, _defaults(), described="description" in overrides)
        if (path := _invalid_string(content)) is not None:
            raise DfkdError(f"{where}: {path} has a NUL character or bytes that are not UTF-8")
        return CHECKED.validate_python(content)
    except ValidationError as error:
        raise DfkdError(f"{where}: {_one_line(error.errors()[0])}") from error
    except RecursionError as error:
        raise DfkdError(f"{where} is nested too deeply") from error


@cache
def _defaults() -> dict[str, Any]:
    """Returns the default of every key by dotted path."""
    return dict(flat(recipe_to_dict(Recipe(name="defaults"))))


def _invalid_string(content: Any, path: str = "") -> str | None:
    """Returns the path of a string that TOML or the system cannot represent, or None."""
    if isinstance(content, Mapping):
        below = [(str(key), value) for key, value in content.items()]
        if any(not _is_text(key) for key, _ in below):
            return path or "a key"
    elif isinstance(content, list | tuple):
        below = [(str(index), value) for index, value in enumerate(content)]
    else:
        return path if isinstance(content, str) and not _is_text(content) else None
    invalid = (_invalid_string(value, f"{path}.{key}" if path else key) for key, value in below)
    return next((where for where in invalid if where is not None), None)


def _is_text(string: str) -> bool:
    return "\0" not in string and not SURROGATE.search(string)


def _one_line(problem: ErrorDetails) -> str:
    sections = problem["loc"][:-1]
    path = ".".join(map(str, problem["loc"]))
    owner = _annotation(sections)
    if problem["type"] == "unexpected_keyword_argument" and dataclasses.is_dataclass(owner):
        return str(unknown("key", path, [".".join(map(str, [*sections, f.name])) for f in dataclasses.fields(owner)]))
    annotation = _annotation(problem["loc"])
    value = short_repr(problem["input"])
    name = problem["input"] if isinstance(problem["input"], str) else value
    if problem["type"] == "literal_error":
        choices = typing.get_args(annotation)
        if not isinstance(choices[0], str):
            return f"{path} = {value}: must be one of {', '.join(map(str, choices))}"
        return f"{path} = {value}: {unknown('choice', name, choices)}"
    if problem["type"] == "choice":
        return f"{path} = {value}: {unknown('choice', name, problem['ctx']['allowed'])}"
    if problem["type"] == "missing":
        return f"{path} is missing"
    if problem["type"] == "value_error":
        return ": ".join(filter(None, (path, problem["msg"].removeprefix("Value error, "))))
    return f"{path} = {value}: must be {_allowed(annotation)}"


def _annotation(path: Sequence[str | int]) -> Any:
    """Returns the declared type at a path into :class:`Recipe`; for an element of a list, that of the list."""
    annotation: Any = Recipe
    for name in path:
        if not dataclasses.is_dataclass(annotation):
            break
        annotation = typing.get_type_hints(annotation, include_extras=True).get(str(name))
        if isinstance(annotation, dataclasses.InitVar):
            annotation = typing.get_args(annotation.type)[0]  # a former key: its type or None
        if annotation is Replay:
            annotation = Replay.complete()
    return annotation


KINDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def _allowed(annotation: Any) -> str:
    if dataclasses.is_dataclass(annotation):
        return "a section"
    kind, *extras = typing.get_args(annotation) if typing.get_origin(annotation) is typing.Annotated else (annotation,)
    if typing.get_origin(kind) is tuple:
        element, *others = typing.get_args(kind)
        count = f"{1 + len(others)} of them" if others and others[0] is not Ellipsis else "any number of them"
        return f"a list ({count}), each {_allowed(element)}"
    bounds = [
        f"{sign} {getattr(bound, name)}"
        for extra in extras
        if isinstance(extra, FieldInfo)
        for bound in extra.metadata
        for name, sign in SIGNS.items()
        if hasattr(bound, name)
    ]
    return " ".join([KINDS.get(kind, "a table of strings"), " and ".join(bounds)]).strip()
