"""Validation of sources before they are published: fields of the types that the tables read, and times that are positive."""

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dfkd_fast.errors import DfkdError

from ..gpu.records import Record
from .results import is_gpu

__all__ = ["check_record", "check_row", "check_run"]

DEPTH = 8  # of nested objects and lists
SHOWN = 80  # characters of a refused value

Name = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class _Fields(BaseModel):
    """Fields that are not declared are never published and may have any value."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Origin(_Fields):
    """Also the defaults of a row: fields that it lacks come from its record's origin."""

    device: str = ""
    torch: str = ""
    triton: str = ""
    numba: str = ""
    commit: str = ""
    command: str = ""


class _Record(_Fields):
    stage: Name
    case: str
    text: str
    seconds: Share | None
    highlight: bool
    table: str
    row: dict[str, Any]
    origin: _Origin


class _Micro(_Origin):
    kernel: Name
    variant: str
    mode: Name
    size: Name
    dtype: Name
    layout: Name
    provider: Name
    status: Name
    error: Annotated[float | None, Field(allow_inf_nan=True)] = None
    """NaN and infinity are allowed: the error of a wrong result."""
    median_us: Positive | None = None
    q20_us: Positive | None = None
    q80_us: Positive | None = None
    timed: str = ""
    calls: int | None = None
    gb_per_s: Positive | None = None
    share_of_copy: Share | None = None
    peak_memory_bytes: int | None = None
    speedup_over_eager: Positive | None = None
    speedup_over_compile: Positive | None = None
    copy_gb_per_s: Positive | None = None
    threads: int | None = None
    load: Share | None = None


class _EndToEnd(_Origin):
    recipe: Name
    batch_size: Annotated[int, Field(gt=0)]
    precision: str = ""
    contender: Name
    seconds_per_iteration: Positive
    student_seconds: Share | None = None
    generator_seconds: Share | None = None
    speedup_over_plain: Positive | None = None
    speedup_over_plain_compiled: Positive | None = None
    speedup_over_plain_compiled_malloc_reuse: Positive | None = None
    peak_memory_mib: float | None = None
    reserved_mib: float | None = None
    warm_up_seconds: Positive | None = None
    kernels_per_iteration: Share | None = None
    kernel_seconds: Share | None = None
    autocast: str = ""
    tf32: str = ""


class _Kernel(_Fields):
    recipe: Name
    batch_size: int | None = None
    contender: Name
    name: Name
    calls_per_iteration: Share | None = None
    us_per_iteration: Share | None = None
    share: Share | None = None


class _Ceilings(_Fields):
    gb_per_s: Positive | None = None
    tflops: Positive | None = None


class _Retention(_Fields):
    last: float
    best: float
    largest_drop: float


class _Seconds(_Fields):
    total: Positive


class _Run(_Fields):
    recipe: Name
    seed: int
    device_name: Name
    metric: Name = "top-1 accuracy"
    command: str
    commit: Name
    versions: dict[str, str | None] = {}
    teacher_accuracy: Annotated[float, Field(gt=0)]
    retention: _Retention
    seconds: _Seconds


class _RetentionOnCpu(_Retention):
    mean: float
    variance: float
    settled_variance: float


class _SecondsOnCpu(_Seconds):
    teacher: Share
    generator: Share
    student: Share
    evaluation: Share


class _RunOnCpu(_Run):
    """A CPU's table has more columns."""

    retention: _RetentionOnCpu
    seconds: _SecondsOnCpu


def _scalar(value: object) -> object:
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError("must be text, a finite number, true, false or null")


_RECORD = TypeAdapter(_Record)
_ROWS: Mapping[str, TypeAdapter[Any]] = {
    "micro": TypeAdapter(_Micro),
    "end-to-end": TypeAdapter(_EndToEnd),
    "accuracy": TypeAdapter(_Run),
    "kernels": TypeAdapter(_Kernel),
    "ceilings": TypeAdapter(_Ceilings),
    "host": TypeAdapter(dict[str, Annotated[Any, AfterValidator(_scalar)]]),
}
_RUN_ON_CPU = TypeAdapter(_RunOnCpu)


def check_record(source: object, record: Record) -> None:
    """Validate all fields of a record except its row.

    Args:
        source: its name, for error messages.

    Raises:
        DfkdError: a field has the wrong type, or text that UTF-8 cannot encode; one line with the field and its value.
    """
    _check(_where(source, record), _RECORD, vars(record))


def check_row(source: object, record: Record, row: Mapping[str, Any]) -> None:
    """Validate a row of a record, if a document shows its table.

    Args:
        source: its name, for error messages.
        row: the row, completed from the record's origin.

    Raises:
        DfkdError: as :func:`check_record`.
    """
    if record.table in _ROWS:
        _check(_where(source, record), _ROWS[record.table], row)


def check_run(source: object, run: Mapping[str, Any]) -> None:
    """Validate the summary of a run.

    Raises:
        DfkdError: as :func:`check_record`.
    """
    device = run.get("device_name")
    _check(str(source), _RUN_ON_CPU if isinstance(device, str) and not is_gpu(device) else _ROWS["accuracy"], run)


def _check(where: str, fields: TypeAdapter[Any], values: Mapping[str, Any]) -> None:
    problem = _encoding_problem(values)
    if problem is None:
        try:
            fields.validate_python(dict(values))
        except ValidationError as error:
            # A field that may be of several types has an error for each of them.
            first = error.errors(include_url=False)[0]
            names = [str(one) for one in first["loc"]]
            missing = first["type"] == "missing" or first["input"] is None
            field, reason = ".".join(names), first["msg"][:1].lower() + first["msg"][1:]
            problem = f"has no {field}" if missing else f"{field} is {_shown(first['input'])}: {reason}"
    if problem is not None:
        raise DfkdError(_one_line(f"{where}: {problem}"))


def _encoding_problem(value: object, name: str = "", depth: int = 0) -> str | None:
    """Why a value cannot be encoded in UTF-8, or None."""
    if depth > DEPTH:
        return f"{name} is nested more than {DEPTH} levels deep"
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return f"{name} is {value[:SHOWN]!a}: has a surrogate, which is not text"
    elif isinstance(value, dict):
        parts = [(f"{name}.{key}".lstrip("."), one) for key, one in value.items()]
        problems = (
            _encoding_problem(key, "a name") or _encoding_problem(one, part, depth + 1)
            for key, (part, one) in zip(value, parts, strict=True)
        )
        return next(filter(None, problems), None)
    elif isinstance(value, list):
        return next(filter(None, (_encoding_problem(one, name, depth + 1) for one in value)), None)
    return None


def _where(source: object, record: Record) -> str:
    names = (one if isinstance(one, str) else _shown(one) for one in (record.stage, record.case))
    return f"{source}: {' / '.join(name[:SHOWN] for name in names if name)}"


def _shown(value: object) -> str:
    try:
        return repr(value)[:SHOWN]
    except RecursionError:
        return type(value).__name__


def _one_line(text: str) -> str:
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())
