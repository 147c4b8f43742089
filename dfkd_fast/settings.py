"""The decorator and the bounded types that every section of a recipe is declared with.

A section is a frozen dataclass that lives beside the code that reads it; its annotations are its
validation, in Python as in TOML.
"""

import dataclasses
from typing import Annotated, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

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


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def settings(section: type[Section]) -> type[Section]:
    """Make a class a section: frozen, keywords only, every value checked, nothing undeclared accepted."""
    return dataclass(section, frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))  # type: ignore[return-value]


# Strict, so that neither "3" nor true passes for a number.
PositiveInt = Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)]
Count = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]
Seed = Annotated[int, Field(strict=True, ge=0, le=2**63 - 1)]
Number = Annotated[float, Field(strict=True)]
Positive = Annotated[float, Field(strict=True, gt=0)]
NonNegative = Annotated[float, Field(strict=True, ge=0)]
Temperature = Annotated[float, Field(strict=True, ge=1e-4, le=1e4)]
"""What the divergences take: beyond it, float32 does not resolve them."""
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
BelowOne = Annotated[float, Field(strict=True, ge=0, lt=1)]
FileName = Annotated[str, Field(pattern=r"^[^./\x00][^/\x00]*$")]
Flag = Annotated[bool, Field(strict=True)]
