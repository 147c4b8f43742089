"""The decorator and the bounded types that every section of a recipe is declared with.

A section is a frozen dataclass that lives beside the code that reads it; its annotations are its
validation, in Python as in TOML.
"""

import dataclasses
from typing import Annotated, TypeVar, dataclass_transform

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from .errors import short_repr

__all__ = [
    "BelowOne",
    "Count",
    "FileName",
    "Flag",
    "Fraction",
    "NonNegative",
    "Number",
    "Positive",
    "PositiveInt",
    "Seed",
    "Temperature",
    "settings",
]

Section = TypeVar("Section")
LONGEST_NAME = 200
"""Bytes of a file name, of the 255 that file systems take: a number or a suffix may follow."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def settings(section: type[Section]) -> type[Section]:
    """Make a class a section: frozen, keywords only, every value checked, nothing undeclared accepted."""
    return dataclass(section, frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))  # type: ignore[return-value]


# Strict, so that neither "3" nor true passes for a number.
PositiveInt = Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)]
Count = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]
Seed = Annotated[int, Field(strict=True, ge=0, le=2**63 - 1)]
# What float32 holds, which networks and losses are computed in.
Number = Annotated[float, Field(strict=True, ge=-1e38, le=1e38)]
Positive = Annotated[float, Field(strict=True, ge=1e-38, le=1e38)]
NonNegative = Annotated[float, Field(strict=True, ge=0, le=1e38)]
Temperature = Annotated[float, Field(strict=True, ge=1e-4, le=1e4)]
"""What the divergences take: beyond it, float32 does not resolve them."""
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
BelowOne = Annotated[float, Field(strict=True, ge=0, lt=1)]


def _names_a_file(name: str) -> str:
    if not name or name[0] == "." or "/" in name or not name.isprintable() or name != name.strip() or len(name.encode()) > LONGEST_NAME:
        raise ValueError(
            f"{short_repr(name)} must be the name of a folder: printable, no '/', at most {LONGEST_NAME} bytes,"
            " beginning with no dot, beginning and ending with no space"
        )
    return name


FileName = Annotated[str, Field(strict=True), AfterValidator(_names_a_file)]
Flag = Annotated[bool, Field(strict=True)]
