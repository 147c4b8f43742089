"""The decorator and the bounded types that every section of a recipe is declared with.

A section is a frozen dataclass that lives beside the code that reads it; its annotations are its
validation, in Python as in TOML.
"""

from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

__all__ = ["Count", "Flag", "Fraction", "NonNegative", "Number", "Positive", "PositiveInt", "settings"]

settings = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))

# Strict, so that neither "3" nor true passes for a number.
PositiveInt = Annotated[int, Field(strict=True, ge=1)]
Count = Annotated[int, Field(strict=True, ge=0)]
Number = Annotated[float, Field(strict=True)]
Positive = Annotated[float, Field(strict=True, gt=0)]
NonNegative = Annotated[float, Field(strict=True, ge=0)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
Flag = Annotated[bool, Field(strict=True)]
