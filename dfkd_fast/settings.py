"""The decorator and the constrained types with which every recipe section is declared.

A section is a frozen dataclass defined next to the code that reads it. Its annotations are validated by pydantic, both for
keyword arguments in Python and for keys in TOML.
"""

import dataclasses
import re
from functools import wraps
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from .errors import short_repr
from .renamed import current_keywords

__all__ = [
    "MAX_COUNT",
    "BelowOne",
    "Count",
    "Duration",
    "FileName",
    "Flag",
    "Fraction",
    "NonNegative",
    "Number",
    "Positive",
    "PositiveInt",
    "Seed",
    "Temperature",
    "seconds_of",
    "settings",
]

Section = TypeVar("Section")
MAX_NAME_BYTES = 200
"""Maximum length of a folder name in UTF-8 bytes. File systems allow 255; a number or suffix may be appended."""
MAX_COUNT = 2**31 - 1
DURATION = re.compile(r"(?:([0-9.]+)h)?(?:([0-9.]+)min)?(?:([0-9.]+)s)?")
MAX_SECONDS = 8760 * 3600


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def settings(section: type[Section]) -> type[Section]:
    """Class decorator that turns a class into a recipe section.

    Returns:
        A frozen, keyword-only pydantic dataclass that validates every value and rejects undeclared keys. Keys that were renamed
        within their section are accepted under their former names with a warning (:mod:`dfkd_fast.renamed`).
    """
    validated = dataclass(section, frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
    construct = validated.__init__

    @wraps(construct)
    def init(self: Any, **keywords: Any) -> None:
        construct(self, **current_keywords(section.__name__.lower(), keywords))

    validated.__init__ = init  # type: ignore[method-assign]
    return validated  # type: ignore[return-value]


# Strict: neither "3" nor true is accepted as a number.
PositiveInt = Annotated[int, Field(strict=True, ge=1, le=MAX_COUNT)]
Count = Annotated[int, Field(strict=True, ge=0, le=MAX_COUNT)]
Seed = Annotated[int, Field(strict=True, ge=0, le=2**63 - 1)]
# The range of float32, in which networks and losses are computed.
Number = Annotated[float, Field(strict=True, ge=-1e38, le=1e38)]
Positive = Annotated[float, Field(strict=True, ge=1e-38, le=1e38)]
NonNegative = Annotated[float, Field(strict=True, ge=0, le=1e38)]
Temperature = Annotated[float, Field(strict=True, ge=1e-4, le=1e4)]
"""Temperature of a softmax. float32 does not resolve the divergences outside this range."""
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
BelowOne = Annotated[float, Field(strict=True, ge=0, lt=1)]


def _check_file_name(name: str) -> str:
    if not name or name[0] == "." or "/" in name or not name.isprintable() or name != name.strip() or len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(
            f"{short_repr(name)} must be the name of a folder: printable, without '/', at most {MAX_NAME_BYTES} bytes,"
            " no leading dot, no leading or trailing space"
        )
    return name


FileName = Annotated[str, Field(strict=True), AfterValidator(_check_file_name)]
Flag = Annotated[bool, Field(strict=True)]


def seconds_of(duration: str) -> float:
    """Returns a duration such as ``"90s"``, ``"40min"``, ``"1.5h"`` or ``"2h30min"`` in seconds.

    Raises:
        ValueError: It is not a duration, or not between 1 s and 8760 h.
    """
    match = DURATION.fullmatch(duration)
    try:
        parts = [float(part or 0) for part in match.groups()] if match else []
    except ValueError:  # 1.2.3
        parts = []
    seconds = sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
    if not 1 <= seconds <= MAX_SECONDS:
        raise _not_a_duration(duration)
    return seconds


def _not_a_duration(value: object) -> ValueError:
    return ValueError(f"{short_repr(value)} must be a duration from 1s to 8760h, such as 90s, 40min, 1.5h or 2h30min")


def _check_duration(value: Any) -> Any:
    if not isinstance(value, str):
        raise _not_a_duration(value)
    if value:
        seconds_of(value)
    return value


Duration = Annotated[str, BeforeValidator(_check_duration)]
"""Duration as text, or an empty string for none."""
